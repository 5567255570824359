"""`compact`: what survives, what is freed, and the kernel bit for bit against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.factories import BAD_PAGE, Cache, make_cache
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.compact import compact
from vllm_budgetkv.ops.reference.compact import compact as compact_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (0, 1, 15, 16, 17, 1000)


def make_shared_cache(lens: Sequence[int], layout: PageLayout, *, room_pages: int = 500) -> Cache:
    """One request whose free stack has room for `room_pages` more."""
    cache = make_cache([lens], layout)
    stack = torch.full((1, int(cache.num_free) + room_pages), BAD_PAGE, dtype=torch.int32)
    stack[0, : int(cache.num_free)] = cache.free_pages[0, : int(cache.num_free)]
    cache.free_pages = stack
    return cache


def run(op: Callable[..., None], cache: Cache, keep: torch.Tensor, poison: bool) -> None:
    op(keep, cache.heads_of(0), cache.stack_of(0), poison)


def random_keep(lens: Sequence[int], share: float, seed: int = 0) -> torch.Tensor:
    """bool [H, n]; True also behind the tokens that a head holds, which must be ignored."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(len(lens), max(lens), generator=generator) < share
    for head, count in enumerate(lens):
        keep[head, count:] = True
    return keep


def tokens_of(cache: Cache, head: int) -> list[torch.Tensor]:
    """K, V and positions of a head in the order of its tokens, copied, as raw bits."""
    count, page_tokens = int(cache.lens[0, head]), cache.pool.layout.page_tokens
    pages = cache.table[0, head, : -(-count // page_tokens)].long()
    pool = cache.pool
    fields = (pool.keys, pool.values, pool.positions)
    return [field[pages].flatten(0, 1)[:count].clone() for field in fields]


def all_pages(cache: Cache) -> list[int]:
    """Held and free pages, sorted; checks that the tables end where the tokens do."""
    page_tokens = cache.pool.layout.page_tokens
    pages = cache.free_pages[0, : int(cache.num_free)].tolist()
    for row, count in zip(cache.table[0], cache.lens[0].tolist(), strict=True):
        num_pages = -(-count // page_tokens)
        assert (row[num_pages:] == -1).all()
        pages += row[:num_pages].tolist()
    return sorted(pages)


def check_compact(cache: Cache, keep: torch.Tensor, poison: bool) -> None:
    """Op and reference agree in every byte; survivors and pages are what they should be."""
    before = [tokens_of(cache, head) for head in range(len(keep))]
    pages_before, expected = all_pages(cache), cache.clone()
    run(compact, cache, keep, poison)
    run(compact_reference, expected, keep, poison)

    assert torch.equal(cache.pool.raw, expected.pool.raw)
    for name in ("table", "lens", "free_pages", "num_free"):
        assert torch.equal(getattr(cache, name), getattr(expected, name)), name
    assert all_pages(cache) == pages_before
    assert len(set(pages_before)) == len(pages_before)
    for head, old in enumerate(before):
        mask = keep[head, : len(old[0])]
        for new, field in zip(tokens_of(cache, head), old, strict=True):
            torch.testing.assert_close(new, field[mask], rtol=0, atol=0)


@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_survivors(dtype: torch.dtype, share: float, poison: bool) -> None:
    cache = make_shared_cache(RAGGED, PageLayout(16, 40, dtype))
    check_compact(cache, random_keep(RAGGED, share), poison)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    """What is poisoned has NaN of two types, and keys of a length that is no power of two."""
    for head_size in (32, 40, 72):
        layout = PageLayout(8, head_size, dtype, is_quantised=True)
        cache = make_shared_cache((150, 0, 33), layout)
        for share in (0.6, 0.0):
            keep = random_keep(cache.lens[0].tolist(), share)
            check_compact(cache, keep, poison=True)
        pages = cache.free_pages[0, : int(cache.num_free)].long()
        for field in (cache.pool.keys, cache.pool.values, cache.pool.digests):
            assert field[pages].isnan().all()


@pytest.mark.parametrize("page_tokens", [8, 16, 256])
def test_page_sizes_and_repetition(page_tokens: int) -> None:
    cache = make_shared_cache((700, 33), PageLayout(page_tokens, 64, torch.bfloat16))
    for seed in range(3):
        lens = cache.lens[0].tolist()
        check_compact(cache, random_keep(lens, 0.6, seed), poison=True)


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_pattern(data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    width = max(*lens, 1) + data.draw(st.integers(0, 3))
    bits = st.lists(st.booleans(), min_size=width, max_size=width)
    keep = torch.tensor([data.draw(bits) for _ in lens])
    cache = make_shared_cache(lens, PageLayout(8, 32, torch.float32))
    check_compact(cache, keep, data.draw(st.booleans()))


def test_stack_order_and_lens() -> None:
    cache = make_shared_cache((40, 20), PageLayout(8, 32, torch.float32))
    table, height = cache.table[0].clone(), int(cache.num_free)
    keep = torch.zeros(2, 40, dtype=torch.bool)
    keep[0, [3, 30, 39]] = True
    run(compact, cache, keep, False)
    assert cache.lens[0].tolist() == [3, 0]
    freed = table[0, 1:5].tolist() + table[1, :3].tolist()
    assert cache.free_pages[0, height : int(cache.num_free)].tolist() == freed


def test_poison_covers_what_is_free_and_nothing_else() -> None:
    cache = make_shared_cache((40,), PageLayout(8, 32, torch.float32))
    freed = cache.table[0, 0, 3:5].long()
    keep = random_keep((40,), 1.0)
    keep[0, 21:] = False
    run(compact, cache, keep, True)
    pool, last = cache.pool, cache.table[0, 0, 2].long()
    for field in (pool.keys, pool.values):
        assert field[freed].isnan().all()
        assert field[last, 5:].isnan().all()
        assert not field[last, :5].isnan().any()
    assert pool.digests[freed].isnan().all()
    assert (pool.positions[last, 5:] == torch.iinfo(torch.int32).max).all()


def test_kernel_refuses_before_it_moves() -> None:
    cache = make_shared_cache((40, 40), PageLayout(8, 32, torch.float32), room_pages=3)
    raw, keep = cache.pool.raw.clone(), torch.zeros(2, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match="10 pages are freed but the free stack has room for 3"):
        run(compact, cache, keep, False)
    with pytest.raises(ValueError, match="holds 40 tokens but keep covers 39"):
        run(compact, cache, keep[:, :39], False)
    cache.table[0, 1, 4] = -1
    with pytest.raises(IndexError, match="entry 4 of a head is page -1"):
        run(compact, cache, keep, False)
    assert torch.equal(cache.pool.raw, raw)
    assert cache.lens[0].tolist() == [40, 40]


def test_wrong_arguments_are_refused() -> None:
    cache = make_shared_cache((40, 40), PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match="keep has 9999 tokens per head"):
        run(compact, cache, torch.zeros(2, 9999, dtype=torch.bool), False)
