"""`reserve` and then `append` of rows that own their pages is what `append` alone does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import Cache, batch_rows, make_cache
from tests.ops.test_append import assert_equal, run
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.reference.reserve import reserve as reserve_reference
from vllm_budgetkv.ops.reserve import reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE_TOKENS = 8
LAYOUT = PageLayout(PAGE_TOKENS, 32, torch.float32)
LENS = [[8, 0, 16, 3], [5, 64, 1, 7], [8, 8, 8, 24]]
BOTH = pytest.mark.parametrize("op", [reserve, reserve_reference], ids=["kernel", "reference"])


def reserve_rows(
    op: Callable[..., None], cache: Cache, slots: Sequence[int], shared: Sequence[bool]
) -> None:
    op(cache.heads, cache.stack, batch_rows(slots, [1] * len(slots), shared))


@BOTH
def test_append_finds_its_pages(op: Callable[..., None]) -> None:
    cache = make_cache(LENS, LAYOUT)
    expected = cache.clone()
    for _ in range(2 * PAGE_TOKENS):
        reserve_rows(op, cache, [2, 0], [True, True])
        run(append_reference, cache, [2, 0], [1, 1], [False, False])
        run(append_reference, expected, [2, 0], [1, 1], [True, True])
        assert_equal(cache, expected)
        if cache.num_free.min() < len(LENS[0]):
            break
    assert (cache.num_free < 8).tolist() == [True, False, True]


@BOTH
def test_rows_that_are_not_shared_are_left_alone(op: Callable[..., None]) -> None:
    cache = make_cache(LENS, LAYOUT)
    expected = cache.clone()
    reserve_rows(op, cache, [0, 2], [False, False])
    assert_equal(cache, expected)


def test_an_empty_stack_is_an_error() -> None:
    cache = make_cache([[8, 8]], LAYOUT, free_pages=1)
    with pytest.raises(RuntimeError, match="head 1 wants 1 pages, but 0 are free"):
        reserve_rows(reserve, cache, [0], [True])


def test_a_full_table_is_an_error() -> None:
    cache = make_cache([[16]], LAYOUT, table_pages=2)
    with pytest.raises(IndexError, match="table is 2 pages wide"):
        reserve_rows(reserve, cache, [0], [True])


def test_a_wild_slot_is_an_error() -> None:
    with pytest.raises(IndexError, match="slot 3"):
        reserve_rows(reserve, make_cache(LENS, LAYOUT), [3], [True])
