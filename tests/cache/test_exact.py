"""The exact pieces: what compression must not change, and what it must keep."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client
from tests.cache.scripted import (
    BLOCKS,
    Haystack,
    Scripted,
    options,
    small_quota,
    video_client,
    watch_free_pages,
)
from vllm_budgetkv.arithmetic.quota import Quota, ceil_div
from vllm_budgetkv.cache.compressor import Compressor

CLASSES = pytest.mark.parametrize("force_class", ["static", "dynamic"])

# --- dense attention over what is retained ----------------------------------------------------


@pytest.mark.parametrize("group", [1, 4])
def test_dynamic_heads_that_read_all_pages_are_dense_attention(group: int) -> None:
    """The lab compares every output, of prefill and of decode, with dense attention."""
    # the smallest ratio that still rounds up to every page, so that the retrieval path runs
    lab = Scripted(
        "hybrid",
        small_quota(),
        pool_blocks=BLOCKS,
        group=group,
        options=options(force_class="dynamic", retrieval_ratio=1 - 1e-9),
    )
    lab.reads_all_pages = True
    client = lab.run(video_client(), outputs=30)
    assert lab.cache.tables.is_retrieving[lab.slot(client)].all()
    retrieving = [step for step in lab.steps if step.num_retrieving_rows]
    assert len(retrieving) == 29


def test_dynamic_heads_that_read_some_pages_differ() -> None:
    """The comparison above can fail: with fewer pages it does."""
    lab = Scripted(
        "hybrid",
        small_quota(),
        pool_blocks=BLOCKS,
        options=options(force_class="dynamic", retrieval_ratio=0.1),
    )
    lab.reads_all_pages = True
    with pytest.raises(AssertionError, match="not close"):
        lab.run(video_client(), outputs=30)


# --- a budget that drops nothing ----------------------------------------------------------------


def outputs_of(lab: Scripted, client: Client) -> torch.Tensor:
    return torch.cat([out.flatten() for out in lab.outputs[client.request_id]])


def run_full(prompt_tokens: int, outputs: int) -> torch.Tensor:
    quota = small_quota(blocks=40, compresses=False)
    lab = Scripted("full", quota, pool_blocks=40)
    return outputs_of(lab, lab.run(video_client("full", prompt_tokens), outputs))


@CLASSES
def test_a_prompt_that_fits_is_policy_full(force_class: str) -> None:
    quota = small_quota()
    lab = Scripted("hybrid", quota, pool_blocks=BLOCKS, options=options(force_class=force_class))
    client = lab.run(video_client(prompt_tokens=quota.tokens - 20), outputs=20)
    assert client.computed_tokens == quota.tokens - 1
    assert not lab.cache.slots.requests["video"].shared
    assert torch.equal(outputs_of(lab, client), run_full(quota.tokens - 20, 20))


@pytest.mark.parametrize("policy", ["hybrid", "window"])
@CLASSES
def test_compression_that_drops_nothing_is_policy_full(
    policy: str, force_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk is scored, selected and compacted, and pages are shared, but all tokens stay."""
    expected = run_full(130, 30)
    monkeypatch.setattr(Quota, "compresses_after", lambda *_: True)
    # as if the prompt did not fit: all blocks at once, and compactions in decode
    monkeypatch.setattr(Quota, "fits", lambda *_: False)
    quota = small_quota(blocks=30)
    lab = Scripted(
        policy,
        quota,
        pool_blocks=30,
        options=options(force_class=force_class, retrieval_ratio=1.0),
    )
    client = lab.run(video_client(prompt_tokens=130), outputs=30)
    assert client.computed_tokens < quota.budget_tokens
    request = lab.cache.slots.requests["video"]
    assert request.shared and request.compressions >= 130 // 24 + 30 // 8
    assert (lab.cache.tables.lens[request.slot] == client.computed_tokens).all()
    assert torch.equal(outputs_of(lab, client), expected)


# --- positions, pages and the order of things -------------------------------------------------


@pytest.mark.parametrize("policy", ["hybrid", "window"])
def test_keys_keep_their_position_and_rotation(policy: str) -> None:
    """After 20 compressions and a long decode a key is, bit by bit, the one of its position."""
    lab = Scripted(policy, small_quota(), pool_blocks=BLOCKS)
    client = lab.run(video_client(), outputs=40)
    for layer in range(3):
        _, keys, _ = lab.project(client, layer, 0, client.computed_tokens)
        for head in range(2):
            positions = lab.held(client, layer, head)
            assert positions[0] == 0 and positions[-1] == client.computed_tokens - 1
            assert len(positions) < 0.3 * client.computed_tokens
            pages = lab.cache.tables.page_table[lab.slot(client), layer, head]
            held = lab.pool.keys[pages[pages >= 0].long()].flatten(0, 1)[: len(positions)]
            assert torch.equal(held, keys[positions, head])


# chunks that fill one layer's head-room to the page, so that no room is left over
TIGHT = small_quota(blocks=14, num_layers=4, chunk_tokens=64, decode_interval_tokens=1)


@pytest.mark.parametrize("policy", ["hybrid", "window"])
def test_one_layer_at_a_time_has_just_enough_room(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free pages at the worst moment: no fewer than none, no more than the rounding of pages."""
    lab = Scripted(policy, TIGHT, pool_blocks=14, options=options(force_class="static"))
    client = video_client()
    free = watch_free_pages(monkeypatch, lab, client)
    lab.run(client, outputs=40)
    assert TIGHT.headroom_tokens < TIGHT.chunk_tokens
    rounding_tokens = TIGHT.page_tokens + TIGHT.decode_interval_tokens
    spare_pages = ceil_div(lab.layers * lab.heads * rounding_tokens, TIGHT.page_tokens)
    assert 0 <= min(free) <= spare_pages


def test_compression_after_the_forward_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same quota and chunks; only the moment of the compression differs."""
    late: list[tuple[Any, ...]] = []
    compress = Compressor.compress

    class Late(Scripted):
        def check_budget(self, client: Client, layer: int) -> None:
            """Nothing is compressed yet."""

        def forward(self, work: dict[Client, int]) -> Any:
            step = super().forward(work)
            while late:
                arguments, keywords = late.pop(0)
                compress(*arguments, **keywords)
            return step

    monkeypatch.setattr(Compressor, "compress", lambda *args, **kwargs: late.append((args, kwargs)))
    with pytest.raises(RuntimeError, match="compress the request before it grows"):
        Late("hybrid", TIGHT, pool_blocks=14).run(video_client(), outputs=1)


@pytest.mark.parametrize("policy", ["hybrid", "window"])
@pytest.mark.parametrize("interval_tokens", [1, 8, 13])
def test_a_long_decode_never_runs_out_of_pages(
    policy: str, interval_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = small_quota(decode_interval_tokens=interval_tokens)
    lab = Scripted(policy, quota, pool_blocks=BLOCKS)
    client = video_client(prompt_tokens=200)
    free = watch_free_pages(monkeypatch, lab, client)
    lab.run(client, outputs=150)
    assert min(free) >= 0
    request = lab.cache.slots.requests["video"]
    in_prefill = 200 // 24 + 1 - quota.budget_tokens // 24
    assert request.compressions == in_prefill + 148 // interval_tokens
    assert len(client.blocks) == BLOCKS


def test_an_output_that_outgrows_the_quota_is_compacted_just_before() -> None:
    """A short prompt stays in the identity state until its next token would not fit."""
    quota = small_quota()
    lab = Scripted("hybrid", quota, pool_blocks=BLOCKS)
    client = lab.run(video_client(prompt_tokens=90), outputs=7)
    request = lab.cache.slots.requests["video"]
    assert client.computed_tokens == quota.tokens and not request.shared
    lab.step({client: 1})
    assert request.shared and request.compressions == 1
    assert int(lab.cache.tables.lens[request.slot].sum(1).max()) <= 2 * (quota.budget_tokens + 1)


@pytest.mark.parametrize("looks_ahead", [False, True], ids=["", "look-ahead"])
def test_a_resumed_request_repeats_itself(looks_ahead: bool) -> None:
    """Preempted in mid-prefill and resumed with the same chunks: the same outputs, bit by bit."""
    kept = []
    for preempt in (False, True):
        lab = Haystack(
            "hybrid", small_quota(), pool_blocks=BLOCKS, needle=101, asking=list(range(474, 480)),
            options=options(),
        )  # fmt: skip
        client = video_client()
        if looks_ahead:
            lab.look_ahead(client, Client(client.request_id + LOOKAHEAD, 0))
        if preempt:
            for _ in range(7):
                lab.step({client: 24})
            lab.give_blocks(client)
            lab.free_blocks.reverse()
            lab.step({}, preempted=(client.request_id,))
            lab.outputs.clear()
        lab.run(client, outputs=20)
        positions = [lab.held(client, layer, head) for layer in range(3) for head in range(2)]
        kept.append((outputs_of(lab, client), torch.cat(positions)))
    for once, again in pairwise(kept):
        assert torch.equal(once[0], again[0])
        assert torch.equal(once[1], again[1])


def test_identity_pages_are_where_vllm_puts_them() -> None:
    """Head-page (block * L + layer) * H + head, so that a cached block serves any request."""
    lab = Scripted("hybrid", small_quota(), pool_blocks=BLOCKS)
    lab.free_blocks = [7, 3, 9, *(b for b in range(BLOCKS) if b not in (7, 3, 9))]
    client = video_client(prompt_tokens=40)
    lab.step({client: 10})
    lab.step({client: 14})
    table = lab.cache.tables.page_table[lab.slot(client)]
    for layer in range(3):
        for head in range(2):
            pages = [(block * 3 + layer) * 2 + head for block in (7, 3, 9)]
            assert table[layer, head].tolist()[:4] == [*pages, -1]


@pytest.mark.parametrize("outputs", [1, 9])
@pytest.mark.parametrize("policy", ["hybrid", "window"])
def test_free_pages_are_poison(policy: str, outputs: int) -> None:
    """A read of a page that was given back shows as NaN in the output.

    The pages that the last compaction of prefill freed are the first that decode takes.
    """
    lab = Scripted(policy, small_quota(), pool_blocks=BLOCKS)
    client = lab.run(video_client(), outputs=outputs)
    tables, slot = lab.cache.tables, lab.slot(client)
    free = tables.free_pages[slot, : int(tables.num_free[slot])].long()
    assert len(free) > 0
    assert lab.pool.keys[free].isnan().all() and lab.pool.values[free].isnan().all()
    blocks = list(client.blocks)
    lab.give_blocks(client)
    lab.step({}, finished=(client.request_id,))
    left = tables.pages_of(blocks).flatten().long()
    assert lab.pool.keys[left].isnan().all() and lab.pool.values[left].isnan().all()


def test_a_preempted_request_gives_up_its_slot() -> None:
    """Or those that wait to be resumed would keep out those that run."""
    lab = Scripted("hybrid", small_quota(), pool_blocks=BLOCKS, num_slots=1)
    first, second = video_client("first"), video_client("second", prompt_tokens=200)
    for _ in range(6):
        lab.step({first: 24})
    lab.give_blocks(first)
    lab.step({second: 24}, preempted=("first",))
    assert list(lab.cache.slots.requests) == ["second"]
    lab.run(second, outputs=2)
    lab.give_blocks(second)
    lab.step({first: 24}, finished=("second",))
    lab.run(first, outputs=2)
    assert lab.cache.reports.records["first"].preemptions == 1
