"""The views that the ops take are of the tables themselves: nothing is copied."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_budgetkv.arithmetic.layout import BlockLayout, PageLayout, PagePool
from vllm_budgetkv.cache.tables import HeadTables

SLOTS, LAYERS, HEADS, WIDTH = 3, 4, 2, 5


@pytest.fixture
def tables() -> HeadTables:
    """Every entry is another number."""
    layout = PageLayout(8, 32, torch.float32)
    pool = PagePool(torch.zeros(1, layout.page_bytes, dtype=torch.uint8), layout)
    shape = (SLOTS, LAYERS, HEADS)
    numbered = (numbers(*sizes) for sizes in ((*shape, WIDTH), shape, (SLOTS, 9), (SLOTS,)))
    flags = torch.zeros(2, *shape, dtype=torch.bool)
    return HeadTables(pool, BlockLayout(LAYERS, HEADS), *numbered, *flags, torch.zeros(shape))


def numbers(*sizes: int) -> torch.Tensor:
    return torch.arange(math.prod(sizes), dtype=torch.int32).view(sizes)


def same_memory(view: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether the view shows these numbers and lies in the memory of the tensor."""
    return torch.equal(view, tensor) and view.data_ptr() == tensor.data_ptr()


def test_a_layer_of_all_slots(tables: HeadTables) -> None:
    for layer in range(LAYERS):
        heads = tables.layer(layer)
        assert same_memory(heads.table, tables.page_table[:, layer])
        assert same_memory(heads.lens, tables.lens[:, layer])
        assert (heads.num_heads, heads.width_pages) == (HEADS, WIDTH)
    assert same_memory(tables.all_layers.table[1, HEADS], tables.page_table[1, 1, 0])
    assert same_memory(tables.all_layers.lens[1, HEADS:], tables.lens[1, 1:].flatten())


def test_layers_of_a_request(tables: HeadTables) -> None:
    one, both = tables.of(2, 1), tables.of(2, [1, 2])
    assert same_memory(one.table, tables.page_table[2, 1])
    assert same_memory(one.lens, tables.lens[2, 1])
    for place, layer in enumerate((1, 2)):
        heads = slice(place * HEADS, (place + 1) * HEADS)
        assert same_memory(both.table[heads], tables.page_table[2, layer])
        assert same_memory(both.lens[heads], tables.lens[2, layer])


def test_layers_that_lie_apart_are_no_view(tables: HeadTables) -> None:
    with pytest.raises(AssertionError):
        tables.of(0, [0, 2])


def test_stacks(tables: HeadTables) -> None:
    assert same_memory(tables.stack.free_pages, tables.free_pages)
    assert same_memory(tables.stack.num_free, tables.num_free)
    assert same_memory(tables.stack_of(1).free_pages, tables.free_pages[1])
    assert same_memory(tables.stack_of(1).num_free, tables.num_free[1:2])
