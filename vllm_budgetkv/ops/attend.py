"""`attend`: causal attention of a batch over heads that hold different numbers of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.attend import attend as attend_reference
from vllm_budgetkv.ops.require import require

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def attend(
    query: torch.Tensor,
    pool: PagePool,
    table: torch.Tensor,
    lens: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Attend from every row's new tokens to the tokens that each head of its request holds.

    Row `r` has `t = query_start[r + 1] - query_start[r]` query tokens, and `lens` counts them
    already: query `i` sees the first `len - t + i + 1` tokens of a head. One that sees none, as
    with an empty head, gets zeros. Query head `q` reads KV head `q // G`. Tokens of no row are
    left alone in `out`.

    The result for a request depends neither on the rest of the batch nor on the number of
    threads. Online softmax after https://arxiv.org/abs/1805.02867.

    Args:
        query: cache dtype [T, Hq, D]; tokens and heads may lie apart.
        pool: only read, and only below `lens`.
        table: int32 [S, H, W], may be a strided view.
        lens: int32 [S, H], may be a strided view.
        slots: int32 [R].
        query_start: int32 [R + 1], first token of each row in `query`, ascending.
        out: as `query`; mutated.
        scale: of the scores, usually 1 / sqrt(D).

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, a page id or a length is out of range.
    """
    layout = pool.layout
    num_slots, num_heads = lens.shape
    require("query", query, layout.dtype, (None, None, layout.head_size))
    require("out", out, layout.dtype, tuple(query.shape))
    require("table", table, torch.int32, (num_slots, num_heads, None))
    require("lens", lens, torch.int32, (None, None))
    require("slots", slots, torch.int32, (None,))
    require("query_start", query_start, torch.int32, (slots.shape[0] + 1,))
    if query.shape[1] % num_heads:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide among {num_heads} KV heads; "
            "pass a multiple"
        )
    rows = (table, lens, slots, query_start)
    match backend.of(query):
        case "reference":
            attend_reference(query, pool, *rows, out, scale)
        case "triton":
            from vllm_budgetkv.ops.triton.attend import attend as attend_triton

            attend_triton(query, pool, *rows, out, scale)
        case "cpp":
            extension.load()
            torch.ops.budgetkv.attend(query, pool.keys, pool.values, *rows, out, scale)
