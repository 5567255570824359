"""`append`: the kernel writes exactly what the reference writes, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import Cache, batch_rows, make_cache, strided_randn
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.append import append
from vllm_budgetkv.ops.reference.append import append as append_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LENS = [[37, 0, 16], [5, 64, 1], [8, 8, 8]]


def run(
    op: Callable[..., None],
    cache: Cache,
    slots: Sequence[int],
    tokens: Sequence[int],
    shared: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append random tokens. Mutates the cache."""
    layout = cache.pool.layout
    shape = (sum(tokens), cache.lens.shape[1], layout.head_size)
    key = strided_randn(shape, layout.kv_dtype, seed=3)
    value = strided_randn(shape, layout.kv_dtype, seed=4)
    op(key, value, cache.heads, cache.stack, batch_rows(slots, tokens, shared))
    return key, value


def assert_equal(actual: Cache, expected: Cache) -> None:
    """Every byte of the pool and every table entry."""
    assert torch.equal(actual.pool.raw, expected.pool.raw)
    for name in ("table", "lens", "free_pages", "num_free"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def give_pages(cache: Cache, slot: int, num_tokens: int) -> None:
    """Enter the pages for new tokens in the table, as the worker does for an identity request."""
    page_tokens = cache.pool.layout.page_tokens
    for head, held in enumerate(cache.lens[slot].tolist()):
        for page in range(-(-held // page_tokens), -(-(held + num_tokens) // page_tokens)):
            cache.num_free[slot] -= 1
            cache.table[slot, head, page] = cache.free_pages[slot, cache.num_free[slot]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
@pytest.mark.parametrize("chunk", [1, 8, 33])
def test_equals_reference(chunk: int, page_tokens: int, dtype: torch.dtype) -> None:
    check_append(PageLayout(page_tokens, 40, dtype), chunk)


def check_append(layout: PageLayout, chunk: int) -> None:
    """A shared and an identity row, a padding row between them, a slot that takes no part."""
    cache = make_cache(LENS, layout, table_pages=16, free_pages=18)
    give_pages(cache, slot=0, num_tokens=7)
    expected = cache.clone()
    rows = ([1, 2, 0], [chunk, 0, 7], [True, True, False])
    run(append, cache, *rows)
    run(append_reference, expected, *rows)
    assert_equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    for head_size, chunk in ((40, 33), (72, 1)):
        check_append(PageLayout(8, head_size, dtype, is_quantised=True), chunk)


@pytest.mark.parametrize("op", [append, append_reference], ids=["kernel", "reference"])
def test_tokens_follow_those_held(op: Callable[..., None]) -> None:
    cache = make_cache(LENS, PageLayout(16, 64, torch.bfloat16), free_pages=12)
    before = [cache.head(1, head) for head in range(3)]
    key, value = run(op, cache, [1], [20], [True])
    assert cache.lens[1].tolist() == [25, 84, 21]
    for head in range(3):
        keys, values = cache.head(1, head)
        assert torch.equal(keys, torch.cat([before[head][0], key[:, head]]))
        assert torch.equal(values, torch.cat([before[head][1], value[:, head]]))
    last_page = cache.table[1, 0, 1]
    assert cache.pool.positions[last_page, :9].tolist() == list(range(111, 120))
    assert cache.pool.keys[last_page, 9:].isnan().all()


@pytest.mark.parametrize("op", [append, append_reference], ids=["kernel", "reference"])
def test_pages_are_popped_by_head_then_page(op: Callable[..., None]) -> None:
    cache = make_cache([[8, 7]], PageLayout(8, 32, torch.float32), free_pages=9)
    top_down = cache.free_pages[0, :9].tolist()[::-1]
    run(op, cache, [0], [17], [True])
    assert cache.table[0, 0, 1:4].tolist() == top_down[:3]
    assert cache.table[0, 1, 1:3].tolist() == top_down[3:5]
    assert cache.num_free.tolist() == [4]


@pytest.mark.parametrize("op", [append, append_reference], ids=["kernel", "reference"])
def test_exhausted_stack_is_refused(op: Callable[..., None]) -> None:
    cache = make_cache([[8, 8]], PageLayout(8, 32, torch.float32), free_pages=3)
    before = cache.pool.raw.clone()
    with pytest.raises(RuntimeError, match="slot 0 head 1 wants 2 pages, but 1 are free"):
        run(op, cache, [0], [9], [True])
    if op is append:
        assert torch.equal(cache.pool.raw, before)


def test_identity_row_without_page_is_refused() -> None:
    cache = make_cache([[8, 8]], PageLayout(8, 32, torch.float32))
    with pytest.raises(IndexError, match="entry 1 of slot 0 head 0 is page -1"):
        run(append, cache, [0], [1], [False])


def test_narrow_table_is_refused() -> None:
    cache = make_cache([[8]], PageLayout(8, 32, torch.float32), table_pages=2)
    with pytest.raises(IndexError, match="needs 3 pages for 17 tokens, but its table is 2 wide"):
        run(append, cache, [0], [9], [True])


def test_wrong_dtype_is_refused() -> None:
    cache = make_cache([[8]], PageLayout(8, 32, torch.float32))
    cache.lens = cache.lens.long()
    with pytest.raises(ValueError, match="lens is torch.int64"):
        run(append, cache, [0], [1], [True])
