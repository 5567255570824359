"""`append`: write the new tokens of a batch behind those that each head holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.require import require

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    pool: PagePool,
    table: torch.Tensor,
    lens: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    first_position: torch.Tensor,
    shared: torch.Tensor,
) -> None:
    """Store the keys, values and positions of every row's new tokens, with score 0.

    Row `r` brings `t = query_start[r + 1] - query_start[r]` tokens; `t = 0` is padding. Each head
    gets them behind its `lens` tokens, and `lens` grows by `t`. A shared row takes each page that
    it lacks from the top of its free stack, heads ascending, then pages ascending; the table of
    another row names its pages already. What the stack holds above `num_free` means nothing.

    Args:
        key: cache dtype [T, H, D]; tokens and heads may lie apart.
        value: as `key`.
        pool: mutated.
        table: int32 [S, H, W], may be a strided view; mutated.
        lens: int32 [S, H], may be a strided view; mutated.
        free_pages: int32 [S, F].
        num_free: int32 [S]; mutated.
        slots: int32 [R].
        query_start: int32 [R + 1], first token of each row in `key`, ascending.
        first_position: int32 [R], logical index of each row's first new token.
        shared: bool [R].

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: a free stack runs out. Tables are then partly updated, the pool is not.
        IndexError: a slot, a page id or the table width is out of range.
    """
    layout = pool.layout
    num_slots, num_heads = lens.shape
    num_rows = slots.shape[0]
    require("key", key, layout.dtype, (None, num_heads, layout.head_size))
    require("value", value, layout.dtype, tuple(key.shape))
    require("table", table, torch.int32, (num_slots, num_heads, None))
    require("lens", lens, torch.int32, (None, None))
    require("free_pages", free_pages, torch.int32, (num_slots, None))
    require("num_free", num_free, torch.int32, (num_slots,))
    require("slots", slots, torch.int32, (None,))
    require("query_start", query_start, torch.int32, (num_rows + 1,))
    require("first_position", first_position, torch.int32, (num_rows,))
    require("shared", shared, torch.bool, (num_rows,))
    tables = (table, lens, free_pages, num_free, slots, query_start, first_position, shared)
    match backend.of(key):
        case "reference":
            append_reference(key, value, pool, *tables)
        case "triton":
            from vllm_budgetkv.ops.triton.append import append as append_triton

            append_triton(key, value, pool, *tables)
        case "cpp":
            extension.load()
            fields = (pool.keys, pool.values, pool.positions, pool.scores)
            torch.ops.budgetkv.append(key, value, *fields, *tables)
