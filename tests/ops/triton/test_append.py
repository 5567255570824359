"""`append` in Triton: every byte as the reference writes it."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import make_cache
from tests.ops.test_append import LENS, assert_equal, check_append, give_pages, run
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.append import append
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.triton.arrival import counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("chunk", "page_tokens"), [(1, 16), (8, 64), (16, 8), (33, 8), (33, 32)])
def test_equals_reference(chunk: int, page_tokens: int, dtype: torch.dtype) -> None:
    """A shared and an identity row, a padding row between them, a slot that takes no part."""
    cache = make_cache(LENS, PageLayout(page_tokens, 40, dtype), table_pages=16, free_pages=18)
    give_pages(cache, slot=0, num_tokens=7)
    expected = cache.clone()
    rows = ([1, 2, 0], [chunk, 0, 7], [True, True, False])
    for _ in range(2):
        run(append, cache, *rows)
        run(append_reference, expected, *rows)
        assert_equal(cache, expected)
        rows = ([1], [3], [True])
    assert (counters(3, torch.device("cpu")) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    for head_size, chunk in ((40, 33), (72, 1)):
        check_append(PageLayout(8, head_size, dtype, is_quantised=True), chunk)


def test_more_rows_than_one_search_step() -> None:
    cache = make_cache([[row % 9] for row in range(140)], PageLayout(8, 32, torch.float32))
    expected = cache.clone()
    rows = (range(140), [row % 3 for row in range(140)], [True] * 140)
    run(append, cache, *rows)
    run(append_reference, expected, *rows)
    assert_equal(cache, expected)


@pytest.mark.parametrize(("free_pages", "table_pages"), [(3, 8), (9, 2)])
def test_a_row_that_does_not_fit_is_left_alone(free_pages: int, table_pages: int) -> None:
    """Its stack is too small, or its table; the other row is served."""
    layout = PageLayout(8, 32, torch.float32)
    cache = make_cache([[8, 8], [3, 3]], layout, free_pages=free_pages, table_pages=table_pages)
    expected = cache.clone()
    run(append, cache, [0, 1], [9, 2], [True, True])
    assert torch.equal(cache.table, expected.table)
    assert cache.lens.tolist() == [[8, 8], [5, 5]]
    assert cache.num_free.tolist() == [free_pages] * 2
    pages = expected.table[1, :, 0].long()
    cache.pool.raw[pages] = expected.pool.raw[pages]
    assert torch.equal(cache.pool.raw, expected.pool.raw)
