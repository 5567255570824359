"""`compact`: move the survivors of one request and layer to the front, free the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.compact import compact as compact_reference
from vllm_budgetkv.ops.require import require

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def compact(
    keep: torch.Tensor,
    scores: torch.Tensor | None,
    pool: PagePool,
    table: torch.Tensor,
    lens: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    poison: bool = False,
) -> None:
    """Keep the chosen tokens of every head, in order, and free the pages behind them.

    K, V, position and score of the survivors move to the front in place (no token moves
    backwards); `lens` becomes the number of survivors; the pages at and beyond
    ceil(survivors / N) are pushed on the free stack, heads ascending and pages ascending, and
    their table entries become -1. Digests are not touched: those of pages whose tokens changed
    are stale until `digest` runs. H may run over the heads of several layers of the request, layer
    by layer: that equals one call per layer.

    Args:
        keep: bool [H, n], which tokens survive; n is at least the largest of `lens`, and what
            lies beyond `lens` is ignored.
        scores: float32 [H, n], written to every survivor; None moves the pool's scores.
        pool: mutated.
        table: int32 [H, W], pages of each head; mutated.
        lens: int32 [H], tokens of each head; mutated.
        free_pages: int32 [F], stack of the request's free pages; mutated.
        num_free: int32 [1], its height; mutated.
        poison: fill freed pages and the slots behind the last token with NaN, as
            `PagePool.poison` does, so that a read of one shows.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    num_heads, num_tokens = table.shape[0], keep.shape[-1]
    require("table", table, torch.int32, (None, None))
    require("keep", keep, torch.bool, (num_heads, None))
    require("lens", lens, torch.int32, (num_heads,))
    require("free_pages", free_pages, torch.int32, (None,))
    require("num_free", num_free, torch.int32, (1,))
    if scores is not None:
        require("scores", scores, torch.float32, (num_heads, num_tokens))
    capacity_tokens = table.shape[1] * pool.layout.page_tokens
    if num_tokens > capacity_tokens:
        raise ValueError(
            f"keep has {num_tokens} tokens per head; a table of {table.shape[1]} pages of "
            f"{pool.layout.page_tokens} tokens holds {capacity_tokens}"
        )
    tables = (table, lens, free_pages, num_free)
    match backend.of(keep):
        case "reference":
            compact_reference(keep, scores, pool, *tables, poison)
        case "triton":
            from vllm_budgetkv.ops.triton.compact import compact as compact_triton

            compact_triton(keep, scores, pool, *tables, poison)
        case "cpp":
            extension.load()
            fields = (pool.keys, pool.values, pool.positions, pool.scores, pool.digests)
            torch.ops.budgetkv.compact(keep, scores, *fields, *tables, poison)
