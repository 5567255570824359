"""`compact`: move the survivors of one request and layer to the front, free the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.compact import compact as compact_reference
from vllm_budgetkv.ops.require import require, require_keep, require_request

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import FreeStack, PagedHeads


def compact(keep: torch.Tensor, heads: PagedHeads, stack: FreeStack, poison: bool = False) -> None:
    """Keep the chosen tokens of every head, in order, and free the pages behind them.

    K, V and position of the survivors move to the front in place (no token moves backwards);
    `lens` becomes the number of survivors; the pages at and beyond ceil(survivors / N) are pushed
    on the free stack, heads ascending and pages ascending, and their table entries become -1.
    Digests are not touched: those of pages whose tokens changed are stale until `digest` runs. H
    may run over the heads of several layers of the request, layer by layer: that equals one call
    per layer.

    Args:
        keep: bool [H, n], which tokens survive; n is at least the largest of `lens`, and what
            lies beyond `lens` is ignored.
        heads: of one request; pool, table and lens are mutated.
        stack: of that request; mutated.
        poison: fill freed pages and the slots behind the last token with NaN, as
            `PagePool.poison` does, so that a read of one shows.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_request(heads)
    require_keep(keep, heads)
    require("free_pages", stack.free_pages, torch.int32, (None,))
    require("num_free", stack.num_free, torch.int32, (1,))
    match backend.of(keep):
        case "reference":
            compact_reference(keep, heads, stack, poison)
        case "triton":
            from vllm_budgetkv.ops.triton.compact import compact as compact_triton

            compact_triton(keep, heads, stack, poison)
        case "cpp":
            extension.load()
            pool = heads.pool
            fields = (pool.keys, pool.values, pool.positions, pool.digests)
            torch.ops.budgetkv.compact(keep, *fields, heads.table, heads.lens, *stack, poison)
