"""`attend_part`: attention to a run of a request's tokens, and how much weight is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.attend import require_group
from vllm_budgetkv.ops.reference.attend_part import attend_part as attend_part_reference
from vllm_budgetkv.ops.require import require, require_layer, require_rows

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads


def attend_part(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    first_token: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Attend from every row's tokens to a run of the tokens of its request.

    Heads hold all tokens from `first_token` on that `lens` counts; a query sees those up to its own
    position. One that sees none gets zeros, and minus infinity for `lse`. The parts of a sequence
    are joined by the weights `exp(lse)` (https://arxiv.org/abs/2501.01005, section 2.2).

    Args:
        query: computed dtype [T, Hq, D]; tokens and heads may lie apart.
        heads: one layer of all slots; the pool is only read, and only below `lens`.
        rows: of the batch; `shared` is not read.
        first_token: position in its request of the first token that a head holds.
        out: float32, as `query`; mutated.
        lse: float32 [T, Hq], contiguous, natural logarithm of the sum of the exponentials of the
            scores; mutated.
        scale: of the scores, usually 1 / sqrt(D).

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, a page id or a length is out of range.
    """
    pool, layout = heads.pool, heads.pool.layout
    require("query", query, layout.dtype, (None, None, layout.head_size))
    require("out", out, torch.float32, query.shape)
    require("lse", lse, torch.float32, query.shape[:2])
    require_layer(heads)
    require_rows(rows)
    require("first_position", rows.first_position, torch.int32, rows.slots.shape)
    require_group(query, heads)
    match backend.of(query):
        case "reference":
            attend_part_reference(query, heads, rows, first_token, out, lse, scale)
        case "triton":
            from vllm_budgetkv.ops.triton.attend_part import attend_part as attend_part_triton

            attend_part_triton(query, heads, rows, first_token, out, lse, scale)
        case "cpp":
            extension.load()
            tables = (heads.table, heads.lens, rows.slots, rows.query_start, rows.first_position)
            results = (out, lse, scale)
            torch.ops.budgetkv.attend_part(
                query, pool.keys, pool.values, *tables, first_token, *results
            )
