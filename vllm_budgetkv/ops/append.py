"""`append`: write the new tokens of a batch behind those that each head holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.require import require, require_layer, require_rows, require_stacks

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: PagedHeads,
    stack: FreeStack,
    rows: BatchRows,
) -> None:
    """Store the keys, values and positions of every row's new tokens.

    Each head gets the `t` tokens of its row behind those that it holds, and `lens` grows by `t`. A
    shared row takes each page that it lacks from the top of its free stack, heads ascending, then
    pages ascending.

    Args:
        key: [T, H, D] as pages store them, see `quantise`; tokens and heads may lie apart.
        value: as `key`.
        heads: one layer of all slots; pool, table and lens are mutated.
        stack: of all slots; `num_free` is mutated.
        rows: of the batch.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: a free stack runs out. Tables are then partly updated, the pool is not.
        IndexError: a slot, a page id or the table width is out of range.
    """
    pool, layout = heads.pool, heads.pool.layout
    require_layer(heads)
    require("key", key, layout.kv_dtype, (None, heads.num_heads, layout.head_size))
    require("value", value, layout.kv_dtype, key.shape)
    require_stacks(stack, heads)
    require_rows(rows)
    require("first_position", rows.first_position, torch.int32, rows.slots.shape)
    require("shared", rows.shared, torch.bool, rows.slots.shape)
    match backend.of(key):
        case "reference":
            append_reference(key, value, heads, stack, rows)
        case "triton":
            from vllm_budgetkv.ops.triton.append import append as append_triton

            append_triton(key, value, heads, stack, rows)
        case "cpp":
            extension.load()
            fields = (pool.keys, pool.values, pool.positions)
            torch.ops.budgetkv.append(key, value, *fields, heads.table, heads.lens, *stack, *rows)
