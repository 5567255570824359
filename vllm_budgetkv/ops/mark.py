"""`mark`: note in the index of one request which tokens its heads hold on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.require import require_layer, require_recalls

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, RecallHeads


def mark(slot: int, heads: PagedHeads, recalls: RecallHeads) -> None:
    """Write a bit per token into the index pages of every head that recalls, in one layer.

    A token is held if one of the head's pages behind those of recalled tokens has its position.

    Args:
        slot: of the request.
        heads: one layer of all slots; marks of the index pages are mutated.
        recalls: of the same layer.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a page id is out of range.
    """
    require_layer(heads)
    require_recalls(recalls, heads.lens.shape)
    match backend.of(heads.table):
        case "reference":
            mark_reference(slot, heads, recalls)
        case "triton":
            from vllm_budgetkv.ops.triton.mark import mark as mark_triton

            mark_triton(slot, heads, recalls)
        case "cpp":
            extension.load()
            pool, tables = heads.pool, (heads.table[slot], heads.lens[slot])
            known = (field[slot] for field in recalls)
            torch.ops.budgetkv.mark(
                pool.positions, pool.index_words, *tables, *known, pool.layout.code_words
            )
