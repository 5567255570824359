"""Whether `store`, `load`, `stage`, `encode`, `mark` and `recall` compute what their references do.

What moves bits must move them exactly, from pinned memory on a GPU. A code may be either of two
levels that are equally near, and of channels with as much energy times variance either may be
coded; so `encode` is judged by the distance of its levels from the keys, and by what the channels
have that it left at their means. Of tokens with as much mass either may come back; so `recall` is
judged by the mass of what it chose. Errors of both are in units of what rounding allows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.kernels.caches import ragged_lens
from benchmarks.kernels.remembered import Remembered, build_tier, remember
from benchmarks.kernels.verdicts import Verdict, same_bits
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.ops.reference.encode import STEP, average
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.reference.index_pages import LEVELS, read_codes, read_digest
from vllm_budgetkv.ops.reference.load import load as load_reference
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.reference.stage import stage as stage_reference
from vllm_budgetkv.ops.reference.store import store as store_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.checks import Sizes

# the layer is one of two, so that its blocks lie apart
NUM_LAYERS = 2
# a prompt over what its heads hold, so long that an index has several pages; the second is shorter
PROMPT_TIMES = 20
SECOND_SHARE = 0.7
MIDDLE = (LEVELS - 1) / 2
# tokens of an entry of the second index that is checked
COARSE_TOKENS = 4
# roundings of a key's level, of the mean of many keys, and of their variance
LEVEL_ROUNDINGS, SMALL_MEAN, VARIANCE_ERROR = 8, 1e-5, 1e-4
# of what may be nothing
SMALLEST = 1e-12


def check_recall(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, *, is_quantised: bool = False
) -> Iterator[Verdict]:
    """Compare the ops with their references on prompts that host memory keeps."""
    layout = PageLayout(sizes.page_tokens, sizes.head_size, dtype, is_quantised)
    longest = PROMPT_TIMES * sizes.mean_tokens
    num_tokens = (longest, int(SECOND_SHARE * longest))
    recalling = torch.ones(2, sizes.heads, dtype=torch.bool)
    recalling[:, -1] = False
    tier = build_tier(num_tokens, NUM_LAYERS, sizes.heads, layout, device)[-1]
    held = ragged_lens(2, sizes.heads, sizes.mean_tokens)
    recalled_pages = max(1, sizes.mean_tokens // (2 * sizes.page_tokens))
    for entry_tokens in (1, COARSE_TOKENS):
        made = remember(
            tier, num_tokens, held, recalling, recalled_pages, layout, entry_tokens=entry_tokens
        )
        if entry_tokens == 1:
            yield from _check_store(made, sizes, num_tokens[1])
        yield from _check_encode(made)
        yield from _check_mark(made)
        yield from _check_recall(made, sizes)


def _check_store(made: Remembered, sizes: Sizes, num_tokens: int) -> Iterator[Verdict]:
    """A chunk that runs over the end of the blocks of slot 1, and a token of slot 0."""
    device, layout = made.device, made.cache.pool.layout
    count = sizes.chunk_tokens
    shape = (count + 1, sizes.heads, sizes.head_size)
    key, value = (torch.randn(shape, device=device).to(layout.kv_dtype) for _ in range(2))
    numbers = ([1, 0], [0, count, count + 1], [num_tokens - count // 2, 1])
    slots, starts, first = (torch.tensor(each, device=device).int() for each in numbers)
    rows = ops.BatchRows(slots, starts, first, torch.zeros_like(slots, dtype=torch.bool))
    num_blocks, *block = made.tier.tokens.shape
    blank = torch.full((num_blocks, NUM_LAYERS, *block), torch.nan, dtype=layout.kv_dtype)
    expected, on_gpu = blank.to(device, copy=True), device.type == "cuda"
    tokens = blank.pin_memory() if on_gpu else blank
    ops.store(key, value, rows, made.tier._replace(tokens=tokens[:, -1]))
    store_reference(key, value, rows, made.tier._replace(tokens=expected[:, -1]))
    yield same_bits("store", "host blocks", tokens.to(device), expected)
    found = torch.full((2, *shape), torch.nan, dtype=layout.kv_dtype, device=device)
    read = found.clone()
    kept = expected.cpu().pin_memory() if on_gpu else expected
    ops.load(*found, rows, made.tier._replace(tokens=kept[:, -1]))
    load_reference(*read, rows, made.tier._replace(tokens=expected[:, -1]))
    yield same_bits("load", "keys and values", found, read)
    yield _check_stage(made)


def _check_stage(made: Remembered) -> Verdict:
    """Two blocks of slot 0, in pages without order."""
    pool, num_heads = made.cache.pool, made.tier.tokens.shape[1]
    pages = torch.randperm(len(pool.raw))[: 2 * num_heads].view(num_heads, 2)
    actual, expected = (replace(pool, raw=pool.raw.clone()) for _ in range(2))
    for op, target in ((ops.stage, actual), (stage_reference, expected)):
        op(pages.int().to(made.device), target, 0, 1, made.tier)
    return same_bits("stage", "pages", actual.raw, expected.raw)


class _Page(NamedTuple):
    """What a page of an index says of its e entries, in float64.

    Attributes:
        mean: [D].
        step: [R].
        channels: int64 [R].
        codes: [e, R].
    """

    mean: torch.Tensor
    step: torch.Tensor
    channels: torch.Tensor
    codes: torch.Tensor

    @property
    def is_sound(self) -> bool:
        """Whether it codes R channels, in order."""
        first, last = int(self.channels[0]), int(self.channels[-1])
        return first >= 0 and last < len(self.mean) and bool((self.channels.diff() > 0).all())

    @property
    def keys(self) -> torch.Tensor:
        """[e, D]: of the channels without codes, the mean."""
        keys = self.mean.repeat(len(self.codes), 1)
        keys[:, self.channels] += self.step * (self.codes - MIDDLE)
        return keys


def _check_encode(made: Remembered) -> Iterator[Verdict]:
    """Digests against float64, and whether nearer levels or better channels were to be had."""
    for slot in range(len(made.cache.lens)):
        ops.encode(slot, made.tier, made.recalls, made.cache.pool, made.energy)
    twin, layout = made.clone(), made.cache.pool.layout
    # means of keys are rounded to the cache's type, to either of two neighbours
    blur = torch.finfo(layout.dtype).eps if made.entry_tokens > 1 else 0.0
    digest_error = choice_error = code_error = 0.0
    for slot, head in (made.recalls.num_tokens > 0).nonzero().tolist():
        parts = _keys(twin, slot, head).split(made.index_tokens)
        for number, part in zip(_index_pages(made, slot, head).tolist(), parts, strict=True):
            keys = average(part, made.entry_tokens, layout.dtype).double()
            page = _read_page(made, number, len(keys))
            if not page.is_sound:
                choice_error = float("inf")
                continue
            choice_error = _larger(choice_error, _choice_error(page, keys, made.energy[head]))
            digest_error = _larger(digest_error, _digest_error(page, keys, layout.dtype, blur))
            code_error = _larger(code_error, _code_error(page, keys, blur))
    yield Verdict("encode", "channels, in roundings", choice_error, 1.0)
    yield Verdict("encode", "means and steps, in roundings", digest_error, 1.0)
    yield Verdict("encode", "codes, in roundings", code_error, 1.0)


def _read_page(made: Remembered, page: int, count: int) -> _Page:
    pool = made.cache.pool
    mean, step, channels = read_digest(pool.digests[page], pool.layout.coded_channels)
    codes = read_codes(pool, torch.tensor([page], device=made.device), made.entry_tokens)
    return _Page(mean.double(), step.double(), channels, codes[0, :count].double())


def _choice_error(page: _Page, keys: torch.Tensor, energy: torch.Tensor) -> float:
    """What the least of the coded channels lacks of the best of the others, over what is allowed.

    Args:
        page: of the index.
        keys: float64 [e, D], of its tokens.
        energy: float32 [D].
    """
    weight = energy.double() * keys.var(0, correction=0)
    others = weight.clone()
    others[page.channels] = 0.0
    best = others.max()
    lacking = best - weight[page.channels].min()
    return float(lacking / (VARIANCE_ERROR * best + SMALLEST))


def _digest_error(page: _Page, keys: torch.Tensor, dtype: torch.dtype, blur: float) -> float:
    """The largest error over what is allowed; the mean is all that is known of most channels."""
    wanted = torch.cat((keys.mean(0), STEP * keys[:, page.channels].std(0, correction=0)))
    allowed = 2 * torch.finfo(dtype).eps * wanted.abs() + SMALL_MEAN + blur * keys.abs().max()
    return float(((torch.cat((page.mean, page.step)) - wanted).abs() / allowed).max())


def _code_error(page: _Page, keys: torch.Tensor, blur: float) -> float:
    """How much nearer to a key another level is, at most, over what is allowed."""
    mean, coded = page.mean[page.channels], keys[:, page.channels]
    steps = torch.arange(LEVELS, device=keys.device) - MIDDLE
    levels = mean[:, None] + page.step[:, None] * steps
    nearest = (levels - coded[..., None]).abs().amin(-1)
    excess = (page.keys[:, page.channels] - coded).abs() - nearest
    rounding = LEVEL_ROUNDINGS * torch.finfo(torch.float32).eps
    allowed = rounding * (coded.abs() + mean.abs() + LEVELS / 2 * page.step) + SMALLEST
    allowed += 2 * blur * (coded.abs() + LEVEL_ROUNDINGS * rounding)
    return float((excess / allowed).max())


def _check_mark(made: Remembered) -> Iterator[Verdict]:
    """Every bit of every page, behind the indexes that `encode` wrote."""
    twin = made.clone()
    for slot in range(len(made.cache.lens)):
        ops.mark(slot, made.cache.heads, made.recalls)
        mark_reference(slot, twin.cache.heads, twin.recalls)
    yield same_bits("mark", "pages", made.cache.pool.raw, twin.cache.pool.raw)


def _check_recall(made: Remembered, sizes: Sizes) -> Iterator[Verdict]:
    """Two steps on the references' index, the second of which wants part of the first again."""
    host = made.clone().tier
    twin = Remembered(made.cache, host, made.recalls, made.energy)
    for slot in range(len(made.cache.lens)):
        encode_reference(slot, twin.tier, twin.recalls, twin.cache.pool, twin.energy)
        mark_reference(slot, twin.cache.heads, twin.recalls)
    device, layout = made.device, made.cache.pool.layout
    shape = (2, sizes.heads * sizes.group, sizes.head_size)
    first, other = (torch.randn(shape, device=device) for _ in range(2))
    slots, before = torch.tensor([1, 0], device=device).int(), made.cache.pool.raw.clone()
    starts = torch.arange(3, device=device).int()
    rows = ops.BatchRows(slots, starts, slots * 0, (slots * 0).bool())
    pages, moved = made.all_recall_pages(), torch.zeros_like(made.cache.lens)
    scale = sizes.head_size**-0.5
    for step, query in (("first", first), ("second", first + 0.3 * other)):
        asked, was = query.to(layout.dtype), made.cache.pool.positions[pages]
        moved.zero_()
        ops.recall(asked, made.cache.heads, rows, made.recalls, made.tier, scale, moved)
        changed = (made.cache.pool.positions[pages] != was).sum()
        yield same_bits("recall", f"{step} step, moved", moved.sum(), changed)
        yield from _check_choice(twin, asked[[1, 0]], scale, step)
    others = torch.ones(made.cache.pool.num_pages, dtype=torch.bool, device=device)
    others[pages] = False
    yield same_bits("recall", "other pages", made.cache.pool.raw[others], before[others])


def _check_choice(
    made: Remembered, queries: torch.Tensor, scale: float, step: str
) -> Iterator[Verdict]:
    """What stands in the recall pages: each token once, none that is held, its bits, its mass.

    Args:
        made: with host memory on the device.
        queries: [S, Hq, D].
        scale: of the logits.
        step: for the names.
    """
    pool, foreign, differing, error = made.cache.pool, 0, 0, 0.0
    for slot, head in (made.recalls.num_recalled > 0).nonzero().tolist():
        pages, held = made.recall_pages(slot, head), made.held(slot, head)
        positions = pool.positions[pages].flatten().long()
        is_free = torch.ones(int(made.recalls.num_tokens[slot, head]), device=held.device).bool()
        is_free[held] = False
        known = (positions >= 0) & (positions < len(is_free))
        known &= is_free[positions.clamp(0, len(is_free) - 1)]
        foreign += len(positions) - len(positions[known].unique())
        for fields, part in ((pool.keys, 0), (pool.values, 1)):
            stored = _stored(made, slot, head, positions[known], part)
            found = fields[pages].flatten(0, 1)[known]
            differing += int(same_bits("", "", found, stored).error)
        group = queries.shape[1] // made.cache.lens.shape[1]
        asked = queries[slot, head * group : (head + 1) * group].double()
        error = _larger(error, _mass_error(made, slot, head, asked * scale, positions[known]))
    yield Verdict("recall", f"{step} step, held or twice", float(foreign), 0.0)
    yield Verdict("recall", f"{step} step, keys and values", float(differing), 0.0)
    yield Verdict("recall", f"{step} step, lacking mass, in roundings", error, 1.0)


def _mass_error(
    made: Remembered, slot: int, head: int, asked: torch.Tensor, positions: torch.Tensor
) -> float:
    """What the chosen tokens lack of the mass of the best, rank by rank, over what is allowed."""
    known = _known_keys(made, slot, head)
    mass = (asked @ known.T).softmax(-1).sum(0)
    free = mass.clone()
    free[made.held(slot, head)] = -1.0
    best = free.topk(len(positions)).values
    found = mass[positions].sort(descending=True).values
    # a logit is a float32 sum of fewer than 2 D products, of terms that may cancel
    size = (asked.abs() @ known.abs().T).max()
    allowed = 4 * asked.shape[1] * torch.finfo(torch.float32).eps * size * best + SMALLEST
    return float(((best - found) / allowed).max())


def _keys(made: Remembered, slot: int, head: int) -> torch.Tensor:
    """[n, D]: all keys of a head."""
    count = int(made.recalls.num_tokens[slot, head])
    positions = torch.arange(count, device=made.device)
    return _stored(made, slot, head, positions, 0)


def _stored(
    made: Remembered, slot: int, head: int, positions: torch.Tensor, part: int
) -> torch.Tensor:
    """[..., D]: keys or values of some tokens as host memory has them."""
    page_tokens = made.tier.page_tokens
    blocks = made.tier.blocks[slot, positions // page_tokens].long()
    return made.tier.tokens[blocks, head, part, positions % page_tokens]


def _index_pages(made: Remembered, slot: int, head: int) -> torch.Tensor:
    count = int(made.recalls.num_tokens[slot, head])
    used = ceil_div(count, made.index_tokens)
    return made.recalls.table[slot, head, :used].long()


def _known_keys(made: Remembered, slot: int, head: int) -> torch.Tensor:
    """float64 [n, D]: what the index says of the keys of a head."""
    count = int(made.recalls.num_tokens[slot, head])
    entries = made.cache.pool.layout.index_entries(made.entry_tokens)
    pages = _index_pages(made, slot, head).tolist()
    known = torch.cat([_read_page(made, page, entries).keys for page in pages])
    return known.repeat_interleave(made.entry_tokens, dim=0)[:count]


def _larger(one: float, other: float) -> float:
    """NaN if either is, so that no comparison hides it."""
    return max(one, other) if one == one and other == other else float("nan")
