"""`attend`: causal attention of a batch over heads that hold different numbers of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.attend import attend as attend_reference
from vllm_budgetkv.ops.require import require, require_layer, require_rows, require_softmax
from vllm_budgetkv.ops.views import Softmax

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads


def attend(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    out: torch.Tensor,
    scale: float | Softmax,
    ahead: torch.Tensor | None = None,
) -> None:
    """Attend from every row's new tokens to the tokens that each head of its request holds.

    `lens` counts the `t` tokens of a row already: query `i` sees the first `len - t + i + 1` tokens
    of a head, and `ahead[i]` more. One that sees none, as with an empty head, gets zeros. Query
    head `q` reads KV head `q // G`. Tokens of no row are left alone in `out`.

    The result for a request depends neither on the rest of the batch nor on the number of
    threads. Online softmax after https://arxiv.org/abs/1805.02867.

    Args:
        query: computed dtype [T, Hq, D]; tokens and heads may lie apart.
        heads: one layer of all slots; the pool is only read, and only below `lens`.
        rows: of the batch; only `slots` and `query_start` are read.
        out: as `query`; mutated.
        scale: of the scores, usually 1 / sqrt(D); or how else they become weights.
        ahead: int32 [T], contiguous: tokens behind it that a query sees, as in a picture whose
            tokens attend both ways. None of another row, and no token sees less far than the one
            in front of it. None where no query sees any.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, a page id, a length or what is ahead is out of range.
    """
    pool, layout = heads.pool, heads.pool.layout
    require("query", query, layout.dtype, (None, None, layout.head_size))
    require("out", out, layout.dtype, query.shape)
    require_layer(heads)
    require_rows(rows)
    require_group(query, heads)
    softmax = Softmax.of(scale)
    require_softmax(softmax, query.shape[1])
    if ahead is not None:
        require("ahead", ahead, torch.int32, query.shape[:1])
    match backend.of(query):
        case "reference":
            attend_reference(query, heads, rows, out, softmax, ahead=ahead)
        case "triton":
            from vllm_budgetkv.ops.triton.attend import attend as attend_triton

            attend_triton(query, heads, rows, out, softmax, ahead)
        case "cpp":
            extension.load()
            tables = (heads.table, heads.lens, rows.slots, rows.query_start)
            torch.ops.budgetkv.attend(query, pool.keys, pool.values, *tables, out, *softmax, ahead)


def require_group(query: torch.Tensor, heads: PagedHeads) -> None:
    """Refuse query heads that do not divide among the KV heads.

    Raises:
        ValueError: with both numbers.
    """
    if query.shape[1] % heads.num_heads:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide among {heads.num_heads} KV heads; "
            "pass a multiple"
        )
