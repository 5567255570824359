"""A request of our own before the first client's, so that what compiles does so at start.

A Triton kernel compiles at its first launch, a policy at its first call, and both again for other
kinds of sizes. Without a rehearsal the first long prompt would wait for all of that, and a kernel
that a card cannot run would show in the middle of a client's request.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.host_blocks import HostPlace
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.rules import Arrival
from vllm_budgetkv.cache.spans import PromptSpans, VisionItem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.terms import Terms
    from vllm_budgetkv.cache.cache import BudgetCache

REQUEST_ID = "budgetkv-rehearsal"
TEXT_TOKENS = 16
FRAME_TOKENS = 64


def rehearse(cache: BudgetCache) -> None:
    """Prefill a video until its heads are as long as they get, then decode past a compaction.

    Under each policy that requests may have, twice: with a probe from the start, as a look-ahead
    leaves one, and without. Where host memory keeps the prompt, once more behind what it kept.
    Tokens are random, and nothing is reported. Must run before the first request: it uses the last
    blocks of the pool, the first of the host. A pool of less than a quota is left alone: vLLM
    starts with one only if every request fits it, and then nothing is ever compressed.

    Args:
        cache: of a policy that compresses; as empty behind it as before, but for the content of
            those blocks, which is NaN in the pool if the cache poisons what is free.
    """
    tables = cache.tables
    num_blocks = tables.pool.num_pages // tables.blocks.stride_pages
    generator = torch.Generator(tables.lens.device).manual_seed(0)
    for offer in cache.slots.rules.offers:
        if offer.policy.compresses and offer.terms.quota.blocks <= num_blocks:
            _rehearse_terms(cache, offer.terms, num_blocks, generator)


def _rehearse_terms(
    cache: BudgetCache, terms: Terms, num_blocks: int, generator: torch.Generator
) -> None:
    blocks = range(num_blocks - terms.quota.blocks, num_blocks)
    chunks = list(_chunks(terms.quota))
    place = _host_place(cache, terms.quota, sum(chunks))
    run = partial(_rehearse_once, cache, terms, blocks, generator=generator)
    run(chunks, place, has_probe=True)
    run(chunks, place, has_probe=False)
    if place is not None:
        place, chunks = _taking_over(place, chunks)
        run(chunks, place, has_probe=True)


def _rehearse_once(
    cache: BudgetCache,
    terms: Terms,
    blocks: Sequence[int],
    chunks: Sequence[int],
    place: HostPlace | None,
    *,
    generator: torch.Generator,
    has_probe: bool,
) -> None:
    slots, device = cache.slots, cache.tables.lens.device
    taken_tokens = 0 if place is None else place.num_tokens
    prompt_tokens = taken_tokens + sum(chunks)
    video = VisionItem(0, prompt_tokens - TEXT_TOKENS, "video", FRAME_TOKENS)
    slots.introduce(REQUEST_ID, PromptSpans(prompt_tokens, (video,), device), Arrival(terms))
    if has_probe:
        seed = cache.layers.probes.new_bank(slots.rules.policies[terms.policy])
        seed.queries.normal_(generator=generator)
        seed.plan_write(list(range(seed.capacity)))
        cache.layers.probes.seed(REQUEST_ID, seed)
    slots.admit(REQUEST_ID, list(blocks), taken_tokens, place)
    if taken_tokens:
        assert cache.layers.replay is not None
        cache.layers.replay.run(slots.requests[REQUEST_ID])
    # one token more than decode appends between two compactions
    for num_tokens in (*chunks, *[1] * (terms.quota.decode_interval_tokens + 1)):
        _run_step(cache, num_tokens, generator)
    slots.end(REQUEST_ID)


def _host_place(cache: BudgetCache, quota: Quota, prompt_tokens: int) -> HostPlace | None:
    """The first host blocks for a prompt; None without host memory, or if it is too small."""
    recaller = cache.layers.recaller
    if recaller is None or quota.recall is None:
        return None
    num_blocks = ceil_div(prompt_tokens, recaller.tier.page_tokens)
    return HostPlace(blocks=tuple(range(num_blocks))) if num_blocks <= recaller.tier.size else None


def _taking_over(place: HostPlace, chunks: Sequence[int]) -> tuple[HostPlace, list[int]]:
    """All whole chunks and a token of the next are there already; and the chunks behind that."""
    *whole, odd, last = chunks
    stops = tuple(accumulate(whole))
    taken = replace(
        place,
        num_shared=len(place.blocks),
        num_tokens=stops[-1] + 1,
        stops=stops,
        found_tokens=stops[-1] + 1,
    )
    return taken, [odd - 1, last]


def _chunks(quota: Quota) -> Iterator[int]:
    """Whole chunks until a head may hold its most, one more, and an odd one as prompts end on."""
    longest_tokens = max(quota.tokens, quota.max_head_tokens)
    if quota.recall is not None:
        # as long as a head is while joined chunks are replayed
        longest_tokens = quota.table_width_pages * quota.page_tokens
    for _ in range(-(-longest_tokens // quota.chunk_tokens) + 1):
        yield quota.chunk_tokens
    # Triton compiles again for numbers that 16 does not divide
    yield max(TEXT_TOKENS, quota.chunk_tokens // 2) + 1
    if quota.recall is not None:
        # what reads recalled tokens first comes by itself
        yield 1


def _run_step(cache: BudgetCache, num_tokens: int, generator: torch.Generator) -> None:
    """One step in which the rehearsing request alone gets `num_tokens` tokens."""
    cache.plan_step({REQUEST_ID: num_tokens})
    step = cache.open_step([REQUEST_ID], torch.tensor([0, num_tokens]))
    first = cache.slots.requests[REQUEST_ID].computed_tokens
    device, layout = cache.tables.lens.device, cache.tables.pool.layout
    step.see_positions(torch.arange(first, first + num_tokens, device=device))
    num_query_heads, num_heads = cache.layers.probes.shape.num_query_heads, cache.tables.num_heads
    query, key, value = (
        torch.randn(
            num_tokens,
            count,
            layout.head_size,
            generator=generator,
            dtype=layout.dtype,
            device=device,
        )
        for count in (num_query_heads, num_heads, num_heads)
    )
    out = torch.empty_like(query)
    for name in cache.layers.index:
        step.run_layer(name, query, key, value, out)
    cache.end_step()
