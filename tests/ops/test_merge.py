"""`merge`: the kernel and the reference against a loop over tokens in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import Cache, assert_within_budget, is_same, make_cache
from tests.ops.naive_merge import HeadTokens, naive_merge
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.merge import MERGE_MODES, VALUE_THRESHOLD, merge
from vllm_budgetkv.ops.reference.merge import merge as merge_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (0, 1, 15, 16, 17, 150)
MANY_POSITIONS = 10_000


def make_case(
    lens: Sequence[int], layout: PageLayout, share: float, seed: int = 0
) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """A cache with clusters of like keys, and random `keep` and `is_vision`, [H, n] each.

    Both are True also behind the tokens that a head holds, which must be ignored.
    """
    cache = make_cache([lens], layout, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    centres = 1.5 * torch.randn(12, layout.head_size, generator=generator)
    shape = (len(lens), max(*lens, 1))
    keep = torch.rand(shape, generator=generator) < share
    is_vision = torch.rand(shape, generator=generator) < 0.5
    for head, count in enumerate(lens):
        keep[head, count:] = is_vision[head, count:] = True
        pages, offsets = slots_of(cache, head)
        cluster = torch.randint(len(centres), (count,), generator=generator)
        keys = cache.pool.keys[pages, offsets].float() * 0.7 + centres[cluster]
        cache.pool.keys[pages, offsets] = keys.to(layout.kv_dtype)
    return cache, keep, is_vision


def slots_of(cache: Cache, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset of every token of a head."""
    index = torch.arange(int(cache.lens[0, head]))
    page_tokens = cache.pool.layout.page_tokens
    return cache.table[0, head, index // page_tokens].long(), index % page_tokens


def tokens_of(cache: Cache, keep: torch.Tensor, is_vision: torch.Tensor) -> list[HeadTokens]:
    heads = []
    for head, (head_keep, head_vision) in enumerate(zip(keep, is_vision, strict=True)):
        slots = slots_of(cache, head)
        fields = (cache.pool.keys, cache.pool.values, cache.pool.positions)
        count = len(slots[0])
        masks = (head_keep[:count], head_vision[:count])
        heads.append(HeadTokens(*(field[slots] for field in fields), *masks))
    return heads


def check_merge(
    cache: Cache,
    keep: torch.Tensor,
    is_vision: torch.Tensor,
    mode: str,
    threshold: float = VALUE_THRESHOLD,
) -> int:
    """Op and reference against the loop; returns how many keys and values have changed.

    All that is no key and no value of a kept token keeps its bits.
    """
    before, expected = cache.clone(), cache.clone()
    old = tokens_of(cache, keep, is_vision)
    exact = naive_merge(old, mode, threshold)
    arguments = (is_vision, mode, MANY_POSITIONS, threshold)
    merge(keep, cache.heads_of(0), *arguments)
    merge_reference(keep, expected.heads_of(0), *arguments)

    changed = 0
    actual_heads = tokens_of(cache, keep, is_vision)
    expected_heads = tokens_of(expected, keep, is_vision)
    for head, tokens in enumerate(old):
        for name, true in zip(("keys", "values"), exact[head], strict=True):
            got, low = (getattr(h[head], name) for h in (actual_heads, expected_heads))
            was = getattr(tokens, name)
            touched = (true != was.double()).any(dim=1)
            assert not (touched & ~tokens.keep).any()
            assert is_same(got[~touched], was[~touched])
            assert is_same(low[~touched], was[~touched])
            if touched.any():
                rounding = 4 * torch.finfo(low.dtype).eps * true.abs().max().item()
                torch.testing.assert_close(low.double(), true, rtol=0, atol=rounding)
                assert_within_budget(got, low, true)
            if low.element_size() == 1:
                # the steps are so long that the budget would let through what is rounded down
                assert int((got != low).sum()) <= 0.002 * int(touched.sum()) * got.shape[1]
            changed += int((got != was).any(dim=1).sum())
            for cached in (cache, before):
                getattr(cached.pool, name)[slots_of(cache, head)] = 0
    assert torch.equal(cache.pool.raw, before.pool.raw)
    assert torch.equal(cache.lens, before.lens) and torch.equal(cache.table, before.table)
    return changed


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 40, 128, 256])
def test_head_sizes(instruction_set: str, head_size: int, dtype: torch.dtype, mode: str) -> None:
    case = make_case(RAGGED, PageLayout(16, head_size, dtype), 0.4)
    assert check_merge(*case, mode) > 20


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype, mode: str) -> None:
    case = make_case((0, 1, 17, 70), PageLayout(16, 72, dtype, is_quantised=True), 0.4)
    assert check_merge(*case, mode, 0.7) > 10


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize("page_tokens", [8, 256])
@pytest.mark.parametrize("share", [0.05, 0.6, 0.95])
def test_shares_and_page_sizes(share: float, page_tokens: int, mode: str) -> None:
    """Up to several blocks of 64 kept tokens and several tiles of 16 dropped ones."""
    case = make_case((260, 33, 64), PageLayout(page_tokens, 64, torch.float32), share, seed=3)
    assert check_merge(*case, mode) > 0


@pytest.mark.parametrize("mode", MERGE_MODES)
def test_nothing_dropped_or_nothing_kept(mode: str) -> None:
    cache, keep, is_vision = make_case((50, 7), PageLayout(8, 32, torch.float32), 0.5)
    for all_stay in (True, False):
        keep = torch.full_like(keep, all_stay)
        assert check_merge(cache.clone(), keep, is_vision, mode) == 0


@pytest.mark.parametrize("mode", MERGE_MODES)
def test_empty_heads(mode: str) -> None:
    layout = PageLayout(8, 32, torch.float32)
    assert check_merge(*make_case((0, 0), layout, 0.5), mode) == 0


@pytest.mark.parametrize("vision", [True, False], ids=["vision", "text"])
@pytest.mark.parametrize("mode", MERGE_MODES)
def test_one_modality(mode: str, vision: bool) -> None:
    cache, keep, is_vision = make_case((90, 70), PageLayout(8, 32, torch.float32), 0.3)
    assert check_merge(cache, keep, torch.full_like(is_vision, vision), mode) > 5


def test_a_modality_of_which_nothing_stays_is_lost_by_value() -> None:
    cache, keep, is_vision = make_case((90, 70), PageLayout(8, 32, torch.float32), 0.3)
    assert check_merge(cache.clone(), ~is_vision, is_vision, "value", -1.0) == 0
    assert check_merge(cache, ~is_vision, is_vision, "average") > 5


@pytest.mark.parametrize(("threshold", "changes"), [(-1.0, True), (0.8, True), (1.01, False)])
def test_threshold(threshold: float, changes: bool) -> None:
    cache, keep, is_vision = make_case((90, 70), PageLayout(8, 32, torch.float32), 0.3)
    assert bool(check_merge(cache, keep, is_vision, "value", threshold)) == changes


def small_case(keys: Sequence[Sequence[float]], values: Sequence[float]) -> Cache:
    """One head whose tokens begin with these numbers; the rest of a key and of a value is 0."""
    cache = make_cache([[len(keys)]], PageLayout(8, 32, torch.float32))
    slots = slots_of(cache, 0)
    cache.pool.keys[slots] = cache.pool.values[slots] = 0.0
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        page, offset = slots[0][index], slots[1][index]
        cache.pool.keys[page, offset, : len(key)] = torch.tensor(key)
        cache.pool.values[page, offset, 0] = value
    return cache


@pytest.mark.parametrize(
    ("mode", "values", "keys"),
    [
        # two guests at the first token: cosine 1 and 0.8; the mean over all is 0.9
        ("average", (1 + 2 + 4) / 3, (1 + 3 + 4) / 3),
        ("pivot", (1 + 1.5 + 2.5) / 3, (1 + 2 + 2.5) / 3),
        ("weighted", (1 + 2) / 2, (1 + 3) / 2),
        ("value", (1 + 2 / 3 * 2 + 0.8 * 0.8 * 4) / (1 + 2 / 3 + 0.64), 1.0),
    ],
)
def test_by_hand(mode: str, values: float, keys: float) -> None:
    cache = small_case([(1, 0), (0, 1), (3, 0), (4, 3)], [1, 9, 2, 4])
    keep = torch.tensor([[True, True, False, False]])
    arguments = (torch.zeros_like(keep), mode, MANY_POSITIONS, 0.79)
    merge(keep, cache.heads_of(0), *arguments)
    slots = slots_of(cache, 0)
    torch.testing.assert_close(cache.pool.values[slots][:, 0], torch.tensor([values, 9.0, 2, 4]))
    torch.testing.assert_close(cache.pool.keys[slots][:, 0], torch.tensor([keys, 0.0, 3, 4]))


@pytest.mark.parametrize("op", [merge, merge_reference])
def test_equal_cosines_go_to_the_lower_index(op: object) -> None:
    """Also across the blocks of 64 kept tokens, and for keys of norm 0."""
    keys = [(1.0, 0.0)] * 100 + [(2.0, 0.0)] * 100 + [(0.0, 0.0), (5.0, 0.0)]
    cache = small_case([(0.0, 1.0), *keys], [1.0] * 200 + [2.0, 3.0, 4.0])
    keep = torch.ones(1, 203, dtype=torch.bool)
    keep[0, -2:] = False
    arguments = (torch.zeros_like(keep), "average", MANY_POSITIONS, 0.8)
    assert callable(op)
    op(keep, cache.heads_of(0), *arguments)
    values = cache.pool.values[slots_of(cache, 0)][:, 0].tolist()
    # the zero key is equally far from all, so it goes to token 0; the other one to token 1
    assert values == [2.0, 2.5] + [1.0] * 198 + [2.0, 3.0, 4.0]


def test_weighted_compares_positions_over_heads() -> None:
    """Position 2 is alike in one head and unlike in the other: on average it is not enough."""
    alike, unlike = [(1, 0), (1, 0), (1, 0)], [(1, 0), (4, 3), (0, 1)]
    lens = [[3, 3]]
    cache = make_cache(lens, PageLayout(8, 32, torch.float32))
    for head, keys in enumerate((alike, unlike)):
        slots = slots_of(cache, head)
        cache.pool.keys[slots] = cache.pool.values[slots] = 0.0
        cache.pool.keys[slots[0], slots[1], :2] = torch.tensor(keys, dtype=torch.float32)
        cache.pool.values[slots[0], slots[1], 0] = torch.tensor([0.0, 1.0, 10.0])
        cache.pool.positions[slots] = torch.tensor([0, 1, 2], dtype=torch.int32)
    keep = torch.tensor([[True, False, False]] * 2)
    assert check_merge(cache.clone(), keep, torch.zeros_like(keep), "weighted") == 3
    merge(keep, cache.heads_of(0), torch.zeros_like(keep), "weighted", 3)
    first = [float(cache.pool.values[slots_of(cache, head)][0, 0]) for head in range(2)]
    assert first == pytest.approx([0.5, 0.4])


def test_kernel_refuses_before_it_changes_anything() -> None:
    cache, keep, is_vision = make_case((40, 40), PageLayout(8, 32, torch.float32), 0.5)
    raw = cache.pool.raw.clone()
    heads = cache.heads_of(0)
    with pytest.raises(ValueError, match="holds 40 tokens but keep covers 39"):
        merge(keep[:, :39], heads, is_vision[:, :39], "pivot", 500)
    with pytest.raises(IndexError, match="holds a token of position .* but seen_tokens is 3"):
        merge(keep, heads, is_vision, "weighted", 3)
    cache.table[0, 1, 4] = -1
    with pytest.raises(IndexError, match="entry 4 of a head is page -1"):
        merge(keep, heads, is_vision, "pivot", 500)
    assert torch.equal(cache.pool.raw, raw)


def test_wrong_arguments_are_refused() -> None:
    cache, keep, is_vision = make_case((40, 40), PageLayout(8, 32, torch.float32), 0.5)
    heads = cache.heads_of(0)
    with pytest.raises(ValueError, match="mode 'mean' is unknown; choose one of average, pivot"):
        merge(keep, heads, is_vision, "mean", 500)
    with pytest.raises(ValueError, match="is_vision is torch.bool"):
        merge(keep, heads, is_vision[:1], "value", 500)
    with pytest.raises(ValueError, match="seen_tokens is -1"):
        merge(keep, heads, is_vision, "value", -1)
    wide = torch.zeros(2, 9999, dtype=torch.bool)
    with pytest.raises(ValueError, match="keep has 9999 tokens per head"):
        merge(wide, heads, wide, "value", 500)
