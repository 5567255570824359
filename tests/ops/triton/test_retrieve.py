"""`retrieve` in Triton against the naive choice of pages."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.ops import test_retrieve as naive
from tests.ops.factories import strided_randn
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.digest import digest as digest_reference
from vllm_budgetkv.ops.retrieve import retrieve
from vllm_budgetkv.ops.triton.ranking import sort_key

LENS = ((400, 0, 17, 161), (1, 15, 16, 333))


@pytest.fixture(autouse=True)
def quick_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "digest", digest_reference)
    monkeypatch.setattr(naive, "LENS", LENS)


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    naive.check_retrieve(PageLayout(16, head_size, dtype), group=2, numbers=(0.4, 1, 2))


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    """Digests have another type than keys, so pages lie apart by other numbers of elements."""
    for head_size in (32, 72):
        naive.check_retrieve(PageLayout(16, head_size, dtype, is_quantised=True), 2, (0.4, 1, 2))


@pytest.mark.parametrize(("page_tokens", "group"), [(8, 1), (8, 7), (64, 3)])
def test_groups_and_pages(page_tokens: int, group: int) -> None:
    layout = PageLayout(page_tokens, 32, torch.float32)
    naive.check_retrieve(layout, group, (0.3, 1, 1), (0, 1, 1))


@pytest.mark.parametrize("numbers", [(1e-6, 0, 1), (0.25, 1, 70), (0.99, 70, 1), (0.5, 0, 2)])
def test_shares(numbers: tuple[float, int, int]) -> None:
    naive.check_retrieve(PageLayout(16, 32, torch.float32), group=2, numbers=numbers)


def test_keep_ratio_one_is_the_input() -> None:
    cache = naive.digested_cache(LENS, PageLayout(16, 32, torch.float32))
    query = strided_randn((2, 4, 32), torch.float32, seed=3)
    dynamic = torch.ones(2, 4, dtype=torch.bool)
    table, lens = naive.run(retrieve, cache, query, [1, 0], dynamic, (1.0, 1, 1))
    assert torch.equal(table, cache.table[[1, 0]])
    assert torch.equal(lens, cache.lens[[1, 0]])


def test_later_page_wins_a_tie() -> None:
    """NaN is the worst score of all."""
    cache = naive.digested_cache([[100]], PageLayout(8, 32, torch.float32))
    cache.pool.digests[cache.table[0, 0, :12].long()] = 0.0
    cache.pool.digests[cache.table[0, 0, 11].long()] = torch.nan
    dynamic = torch.ones(1, 1, dtype=torch.bool)
    table, _ = naive.run(retrieve, cache, torch.ones(1, 1, 32), [0], dynamic, (0.3, 1, 1))
    assert table[0, 0, :4].tolist() == cache.table[0, 0, [0, 9, 10, 12]].tolist()


@triton.jit
def keys_kernel(numbers: tl.tensor, keys: tl.tensor) -> None:
    index = tl.arange(0, 8)
    tl.store(keys + index, sort_key(tl.load(numbers + index)))


def test_sort_keys_have_the_order_of_their_numbers() -> None:
    """NaN as minus infinity, both zeros as one, numbers that differ by one bit as two."""
    inf, nan, tiny = torch.inf, torch.nan, 1e-45
    numbers = torch.tensor([nan, -inf, -2.0, -tiny, -0.0, 0.0, tiny, inf])
    keys = torch.zeros(8, dtype=torch.int32)
    keys_kernel[(1,)](numbers, keys)
    assert keys[0] == keys[1]
    assert keys[4] == keys[5]
    assert keys.unique().tolist() == keys[[1, 2, 3, 4, 6, 7]].tolist()
