"""Whether every kernel computes what its reference does; one that does not gets no time.

The error budget is that of the op tests: at most twice the error of plain torch in the cache dtype,
both measured against float64, plus a rounding step. What moves bits must move them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.caches import Cache, build_cache, ragged_lens
from benchmarks.kernels.recall_checks import check_recall
from benchmarks.kernels.verdicts import Verdict, same_bits, within_budget
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.reference.attend import attend as attend_reference
from vllm_budgetkv.ops.reference.attend_part import attend_part as attend_part_reference
from vllm_budgetkv.ops.reference.compact import compact as compact_reference
from vllm_budgetkv.ops.reference.contrast import contrast as contrast_reference
from vllm_budgetkv.ops.reference.digest import digest as digest_reference
from vllm_budgetkv.ops.reference.merge import merge as merge_reference
from vllm_budgetkv.ops.reference.quantise import quantise as quantise_reference
from vllm_budgetkv.ops.reference.reserve import reserve as reserve_reference
from vllm_budgetkv.ops.reference.retrieve import retrieve as retrieve_reference
from vllm_budgetkv.ops.reference.score import score as score_reference
from vllm_budgetkv.ops.reference.select import select as select_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.shapes import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Sizes of the caches that are checked."""

    name: str
    heads: int
    group: int
    head_size: int
    page_tokens: int
    mean_tokens: int
    chunk_tokens: int
    probe_rows: int


# what a stored 1 of quantised pages stands for: no power of two
UNIT = 0.7
QUANTISED = ", quantised"
# of GPUs that have numbers of the type of quantised pages
FIRST_CAPABILITY = (8, 9)
# of the small caches, as they are and quantised
SMALL_DTYPES = (
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16, torch.float32),
)

SMALL = Sizes("small", 3, 2, 32, 8, 21, 5, 3)


def representative(model: ModelShape, page_tokens: int) -> Sizes:
    """A compressed cache of a model, a tenth of 30,000 tokens, and a chunk behind it."""
    sizes = (model.kv_heads, model.group, model.head_size, page_tokens)
    return Sizes(model.name, *sizes, mean_tokens=3000, chunk_tokens=256, probe_rows=32)


def check(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, *, is_quantised: bool = False
) -> Iterator[Verdict]:
    """Compare every op with its reference on random caches."""
    torch.manual_seed(0)
    layout = PageLayout(sizes.page_tokens, sizes.head_size, dtype, is_quantised)
    lens = ragged_lens(2, sizes.heads, sizes.mean_tokens)

    def fresh() -> Cache:
        growth_tokens = sizes.chunk_tokens + 1
        return build_cache(lens, layout, device, growth_tokens=growth_tokens, poison=True)

    yield from _check_append(fresh(), sizes)
    yield from _check_reserve(fresh())
    yield from _check_attend(fresh(), sizes)
    yield from _check_attend_part(fresh(), sizes)
    yield from _check_score(fresh(), sizes)
    yield from _check_contrast(fresh())
    yield from _check_select(fresh())
    yield from _check_compact(fresh())
    yield from _check_digest(fresh())
    yield from _check_retrieve(fresh(), sizes)
    yield from _check_merge(fresh())
    yield from check_recall(sizes, dtype, device, is_quantised=is_quantised)
    if is_quantised:
        yield from _check_quantise(sizes, dtype, device)


def _same_caches(op: str, actual: Cache, expected: Cache) -> Iterator[Verdict]:
    """Pool and tables; above `num_free` the stack means nothing."""
    for name in ("table", "lens", "num_free"):
        yield same_bits(op, name, getattr(actual, name), getattr(expected, name))
    height = torch.arange(actual.free_pages.shape[1], device=actual.table.device)
    stacks = (
        each.free_pages.masked_fill(height >= each.num_free[:, None], -1)
        for each in (actual, expected)
    )
    yield same_bits(op, "free stack", *stacks)
    yield same_bits(op, "pages", actual.pool.raw, expected.pool.raw)


def two_rows(first_tokens: int, device: torch.device) -> ops.BatchRows:
    """Slot 1 with some tokens, slot 0 with one; both take pages of their free stacks."""
    starts = int32(0, first_tokens, first_tokens + 1, device=device)
    shared = torch.tensor([True, True], device=device)
    return ops.BatchRows(int32(1, 0, device=device), starts, int32(40, 90, device=device), shared)


def int32(*values: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _check_append(cache: Cache, sizes: Sizes) -> Iterator[Verdict]:
    """A chunk and a decode token, both from the free stack."""
    device, layout = cache.table.device, cache.pool.layout
    tokens = sizes.chunk_tokens + 1
    numbers = torch.randn(tokens, sizes.heads, sizes.head_size, device=device)
    key, value = numbers.to(layout.kv_dtype), (-numbers).to(layout.kv_dtype)
    rows = two_rows(sizes.chunk_tokens, device)
    expected = cache.clone()
    for op, target in ((ops.append, cache), (append_reference, expected)):
        op(key, value, target.heads, target.stack, rows)
    yield from _same_caches("append", cache, expected)


def _check_reserve(cache: Cache) -> Iterator[Verdict]:
    """Every second head at the end of a page, one slot shared and one not."""
    device, page_tokens = cache.table.device, cache.pool.layout.page_tokens
    every_second = cache.lens[:, ::2]
    every_second.sub_(every_second % page_tokens).clamp_(min=page_tokens)
    rows = two_rows(1, device)
    rows.shared[1] = False
    expected = cache.clone()
    for op, target in ((ops.reserve, cache), (reserve_reference, expected)):
        op(target.heads, target.stack, rows)
    yield from _same_caches("reserve", cache, expected)


def _softmax(layout: PageLayout) -> ops.Softmax:
    """Of keys and values in units, if they are quantised."""
    unit = UNIT if layout.is_quantised else 1.0
    return ops.Softmax(unit * layout.head_size**-0.5, value_unit=unit)


def _check_attend(cache: Cache, sizes: Sizes) -> Iterator[Verdict]:
    """Decode; and a chunk, held already, with a decode row behind it."""
    device, layout = cache.table.device, cache.pool.layout
    scale = _softmax(layout)
    shortest = int(cache.lens.min())
    for what, tokens in (("decode", 1), ("chunk", max(2, min(sizes.chunk_tokens, shortest)))):
        shape = (tokens + 1, sizes.heads * sizes.group, sizes.head_size)
        query = torch.randn(shape, device=device).to(layout.dtype)
        actual, rounded = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
        exact = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        arguments = (query, cache.heads, two_rows(tokens, device))
        # the middle of the chunk is a picture whose tokens see each other
        ahead = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        picture = ahead[tokens // 4 : tokens - tokens // 4]
        picture.copy_(torch.arange(len(picture) - 1, -1, -1))
        for kind, seen in ((what, None), (f"{what} with a picture", ahead))[:tokens]:
            ops.attend(*arguments, actual, scale, seen)
            attend_reference(*arguments, rounded, scale, ahead=seen)
            attend_reference(*arguments, exact, scale, seen, torch.float64)
            yield within_budget("attend", kind, actual, rounded, exact)


def _check_attend_part(cache: Cache, sizes: Sizes) -> Iterator[Verdict]:
    """A chunk that begins inside of what the heads hold, and a token behind all of it.

    Kernels may round weights to the cache's type, where the reference in float32 does not.
    """
    device, layout, tokens = cache.table.device, cache.pool.layout, sizes.chunk_tokens
    shape = (tokens + 1, sizes.heads * sizes.group, sizes.head_size)
    query = torch.randn(shape, device=device).to(layout.dtype)
    # rows begin at positions 40 and 90
    arguments = (query, cache.heads, two_rows(tokens, device), 32)
    results = [
        (torch.full(shape, torch.nan, dtype=dtype, device=device), weight)
        for dtype in (torch.float32, torch.float64)
        for weight in [torch.full(shape[:2], torch.nan, dtype=dtype, device=device)]
    ]
    actual, exact = results
    ops.attend_part(*arguments, *actual, sizes.head_size**-0.5)
    attend_part_reference(*arguments, *exact, sizes.head_size**-0.5, torch.float64)
    rounded = [each.to(layout.dtype) for each in exact]
    yield within_budget("attend_part", "mean", actual[0], rounded[0], exact[0])
    yield within_budget("attend_part", "weight", actual[1], rounded[1], exact[1])


def _check_score(cache: Cache, sizes: Sizes) -> Iterator[Verdict]:
    """Against the reference, which is float32 like the kernel and sums in another order."""
    device, layout = cache.table.device, cache.pool.layout
    shape = (sizes.probe_rows, sizes.heads * sizes.group, sizes.head_size)
    probe = torch.randn(shape, device=device).to(layout.dtype)
    numbers = (_softmax(layout), max(4, sizes.mean_tokens // 10), 4)
    for takes_largest, suffix in ((False, ""), (True, ", largest")):
        arguments = (*numbers, takes_largest, int(cache.lens[0].max()))
        actual = ops.score(probe, cache.heads_of(0), *arguments)
        expected = ops.Scores(*score_reference(probe, cache.heads_of(0), *arguments))
        yield same_bits("score", f"positions{suffix}", actual.positions, expected.positions)
        for name in ("mass", "topk_mass", "value_norms"):
            got, wanted = getattr(actual, name), getattr(expected, name)
            allowed = 1e-6 + 5e-5 * wanted.abs().max().item()
            error = (got - wanted).abs().max().item()
            yield Verdict("score", f"{name}{suffix}", error, allowed)


def _check_contrast(cache: Cache) -> Iterator[Verdict]:
    """Against float64; the reference in float32 sets the budget."""
    arguments = (cache.heads_of(0), int(cache.lens[0].max()))
    exact = contrast_reference(*arguments, torch.float64)
    pair = (ops.contrast(*arguments), contrast_reference(*arguments))
    yield within_budget("contrast", "contrast", *pair, exact)


def _check_select(cache: Cache) -> Iterator[Verdict]:
    """Exactly, with ties among the scores."""
    lens, device = cache.lens[0], cache.table.device
    scores = torch.rand(len(lens), int(lens.max()), device=device).mul(50).round()
    tiers = torch.randint(0, 3, scores.shape, device=device).to(torch.uint8)
    arguments = (scores, tiers, lens, (lens * 0.6).int())
    yield same_bits("select", "keep", ops.select(*arguments), select_reference(*arguments))


def _check_compact(cache: Cache) -> Iterator[Verdict]:
    """Byte for byte; what is quantised is poisoned too, with the NaN of two types."""
    lens, device = cache.lens[0], cache.table.device
    poison = cache.pool.layout.is_quantised
    scores = torch.rand(len(lens), int(lens.max()), device=device)
    expected = cache.clone()
    for op, target in ((ops.compact, cache), (compact_reference, expected)):
        op(scores > 0.5, target.heads_of(0), target.stack_of(0), poison)
    yield from _same_caches("compact", cache, expected)


def _check_digest(cache: Cache) -> Iterator[Verdict]:
    """Against the reference, which sums in another order: one rounding step more."""
    expected = cache.clone()
    ops.digest(cache.heads_of(0))
    digest_reference(expected.heads_of(0))
    wanted = expected.pool.digests.double()
    error = (cache.pool.digests.double() - wanted).abs().max().item()
    allowed = 2 * torch.finfo(cache.pool.layout.dtype).eps * wanted.abs().max().item()
    yield Verdict("digest", "centre and radius", error, allowed)


def _check_retrieve(cache: Cache, sizes: Sizes) -> Iterator[Verdict]:
    """The same numbers of pages, and as good ones: at a tie of roundings either page will do."""
    device, layout = cache.table.device, cache.pool.layout
    rows, choice = two_rows(1, device), ops.PageChoice(0.4, 1, 2)
    shape = (2, sizes.heads * sizes.group, sizes.head_size)
    query = torch.randn(shape, device=device).to(layout.dtype)
    dynamic = torch.ones(2, sizes.heads, dtype=torch.bool, device=device)
    found = []
    for op in (ops.retrieve, retrieve_reference):
        out = (torch.full_like(cache.table, 2**30), torch.full_like(cache.lens, -7))
        read = ops.PagedHeads(cache.pool, *out)
        op(query, cache.heads, rows, dynamic, choice, read)
        found.append(out)
    (table, lens), (wanted_table, wanted_lens) = found
    yield same_bits("retrieve", "lens", lens, wanted_lens)
    differing = float((table != wanted_table).sum())
    # a page that is swapped at a tie moves the ones listed behind it
    yield Verdict("retrieve", "pages", differing, 0.01 * float((wanted_table >= 0).sum()))


def _check_merge(cache: Cache) -> Iterator[Verdict]:
    """`value`, without a threshold, so that all that is dropped moves."""
    lens, device = cache.lens[0], cache.table.device
    shape = (len(lens), int(lens.max()))
    keep = torch.rand(shape, device=device) < 0.5
    is_vision = torch.rand(shape, device=device) < 0.7
    before, expected = cache.clone(), cache.clone()
    for op, target in ((ops.merge, cache), (merge_reference, expected)):
        op(keep, target.heads_of(0), is_vision, "value", shape[1], -1.0)
    yield same_bits("merge", "keys", cache.pool.keys, before.pool.keys)
    held = ~expected.pool.values.float().isnan()
    wanted = expected.pool.values[held].double()
    error = (cache.pool.values[held].double() - wanted).abs()
    layout = cache.pool.layout
    # the steps of 8 bits are so long that what is rounded wrongly would be within them
    steps = 0 if layout.is_quantised else 2
    step = steps * torch.finfo(layout.dtype).eps * wanted.abs().max().item()
    # two kept keys that are equally like a dropped one may take it in differently
    yield Verdict("merge", "values", float((~(error <= step)).sum()), 0.001 * len(error))


def _check_quantise(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """Every code, from below the smallest to beyond the largest.

    Against the reference on a CPU: on a GPU torch divides by a number by way of its inverse.
    """
    shape = (sizes.chunk_tokens, sizes.heads, sizes.head_size)
    spread = torch.logspace(-4, 3, sizes.head_size, device=device)
    key, value = ((torch.randn(shape, device=device) * spread).to(dtype) for _ in range(2))
    found = ops.quantise(key, value, UNIT, UNIT / 10)
    expected = quantise_reference(key.cpu(), value.cpu(), UNIT, UNIT / 10)
    for name, actual, wanted in zip(("keys", "values"), found, expected, strict=True):
        yield same_bits("quantise", name, actual.cpu(), wanted)


def has_quantised_type(device: torch.device) -> bool:
    """Whether kernels can be compiled for quantised pages."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def run_checks(
    all_sizes: list[Sizes], device: torch.device, say: Callable[[str], None]
) -> list[Verdict]:
    """Check every size in bfloat16, the small one in other types too, all of them quantised too.

    Says each failure, and what this device cannot run.
    """
    verdicts: list[Verdict] = []
    for is_quantised in (False, True):
        if is_quantised and not has_quantised_type(device):
            say("NOT CHECKED: quantised pages, of whose type this GPU has no numbers")
            continue
        for sizes in all_sizes:
            dtypes = SMALL_DTYPES[is_quantised] if sizes is SMALL else (torch.bfloat16,)
            for dtype in dtypes:
                found = list(check(sizes, dtype, device, is_quantised=is_quantised))
                verdicts += _named(found, is_quantised)
                _say_wrong(found, f"{sizes.name}, {dtype}{QUANTISED * is_quantised}", say)
    return verdicts


def _named(verdicts: list[Verdict], is_quantised: bool) -> list[Verdict]:
    return [each._replace(what=f"{each.what}{QUANTISED * is_quantised}") for each in verdicts]


def _say_wrong(verdicts: list[Verdict], where: str, say: Callable[[str], None]) -> None:
    for verdict in verdicts:
        if not verdict.holds:
            say(
                f"WRONG: {verdict.op}, {verdict.what}, {where}: "
                f"error {verdict.error:.3e}, allowed {verdict.allowed:.3e}"
            )
