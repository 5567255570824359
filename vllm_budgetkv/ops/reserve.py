"""`reserve`: the pages that the next token of every head needs, for all layers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.reserve import reserve as reserve_reference
from vllm_budgetkv.ops.require import require, require_layer, require_stacks

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads


def reserve(heads: PagedHeads, stack: FreeStack, rows: BatchRows) -> None:
    """Enter the page of one more token in the table of every head whose last page is full.

    Once before the layers of a decode step: `append` then finds every page in its table, so that
    its rows are no longer shared ones and no layer waits for a free stack. A shared row takes the
    pages from the top of its free stack, heads ascending; other rows have theirs and are left as
    they are. Lengths do not change.

    Args:
        heads: of all slots; H may run over all layers. The table is mutated, the pool is not read.
        stack: of all slots; `num_free` is mutated.
        rows: of the batch; only `slots` and `shared` are read.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: a free stack runs out. Tables are then partly updated.
        IndexError: a slot or the table width is out of range.
    """
    require_layer(heads)
    require_stacks(stack, heads)
    require("slots", rows.slots, torch.int32, (None,))
    require("shared", rows.shared, torch.bool, rows.slots.shape)
    match backend.of(heads.table):
        case "reference":
            reserve_reference(heads, stack, rows)
        case "triton":
            from vllm_budgetkv.ops.triton.reserve import reserve as reserve_triton

            reserve_triton(heads, stack, rows)
        case "cpp":
            extension.load()
            tables = (heads.table, heads.lens, *stack, rows.slots, rows.shared)
            torch.ops.budgetkv.reserve(*tables, heads.page_tokens)
