"""`reserve` in Triton: every table entry as the reference writes it."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import make_cache
from tests.ops.test_append import assert_equal
from tests.ops.test_reserve import LAYOUT, PAGE_TOKENS, reserve_rows
from vllm_budgetkv.ops.reference.reserve import reserve as reserve_reference
from vllm_budgetkv.ops.reserve import reserve


@pytest.mark.parametrize("num_heads", [1, 6, 40])
def test_equals_reference(num_heads: int) -> None:
    """Full pages, partial ones and empty heads; a row that owns its pages, a slot left out."""
    generator = torch.Generator().manual_seed(num_heads)
    lens = torch.randint(0, 4, (4, num_heads), generator=generator) * PAGE_TOKENS
    lens += torch.randint(0, 2, lens.shape, generator=generator)
    cache = make_cache(lens.tolist(), LAYOUT, free_pages=num_heads)
    expected = cache.clone()
    for slots, shared in (([2, 0, 3], [True, True, False]), ([1], [True])):
        reserve_rows(reserve, cache, slots, shared)
        reserve_rows(reserve_reference, expected, slots, shared)
        assert_equal(cache, expected)


@pytest.mark.parametrize(("free_pages", "table_pages"), [(1, 8), (9, 1)])
def test_a_row_that_does_not_fit_is_left_alone(free_pages: int, table_pages: int) -> None:
    cache = make_cache([[8, 8], [3, 0]], LAYOUT, free_pages=free_pages, table_pages=table_pages)
    expected = cache.clone()
    reserve_rows(reserve, cache, [0, 1], [True, True])
    reserve_rows(reserve_reference, expected, [1], [True])
    assert_equal(cache, expected)
