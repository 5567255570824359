"""`retrieve`: the pages that a dynamic head reads in one decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.retrieve import retrieve as retrieve_reference
from vllm_budgetkv.ops.require import require, require_layer

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, PageChoice, PagedHeads


def retrieve(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    dynamic: torch.Tensor,
    choice: PageChoice,
    out: PagedHeads,
) -> None:
    """Choose the pages of every dynamic head for the query of each row, in one layer.

    A dynamic head of `pages` pages keeps max(ceil(keep_ratio * pages),
    min(pages, sink_pages + window_pages)): the first `sink_pages`, the last `window_pages`, and of
    the rest those with the best score, the largest q.k in the box of the page's digest (c, r):
    sum_i max(q_i (c_i - r_i), q_i (c_i + r_i)), in float32. The best score of the group's query
    heads counts; of equal scores the later page wins. Other heads keep all pages. With keep_ratio 1
    the output equals the input.

    Based on ArkVale (NeurIPS 2024, https://nips.cc/virtual/2024/poster/96635); unlike the paper
    the group takes the maximum, not the mean, so that no query head loses its page.

    Args:
        query: [R, Hq, D], float32, bfloat16 or float16: one decode query per row.
        heads: one layer of all slots; the digests of sink and window pages are not needed.
        rows: of the batch, one token each; only `slots` is read.
        dynamic: bool [S, H], heads that retrieve.
        choice: how many pages.
        out: the chosen pages, row `r` in place `r`, which `attend` reads. Its table, [R, H, W] in
            ascending order and then -1, and its lens, tokens in those pages, are mutated.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    require_layer(heads)
    require("slots", rows.slots, torch.int32, (None,))
    (num_slots, num_heads), num_rows = heads.lens.shape, rows.slots.shape[0]
    require("query", query, query.dtype, (num_rows, None, heads.pool.layout.head_size))
    require("dynamic", dynamic, torch.bool, (num_slots, num_heads))
    require("out.table", out.table, torch.int32, (num_rows, num_heads, heads.width_pages))
    require("out.lens", out.lens, torch.int32, (num_rows, num_heads))
    if query.shape[1] % num_heads:
        raise ValueError(
            f"query has {query.shape[1]} heads; pass a multiple of the {num_heads} KV heads"
        )
    if not 0.0 < choice.keep_ratio <= 1.0 or choice.sink_pages < 0 or choice.window_pages < 1:
        raise ValueError(
            f"{choice}: keep_ratio must be in (0, 1], sink_pages at least 0, "
            "window_pages at least 1"
        )
    match backend.of(query):
        case "reference":
            retrieve_reference(query, heads, rows, dynamic, choice, out)
        case "triton":
            from vllm_budgetkv.ops.triton.retrieve import retrieve as retrieve_triton

            retrieve_triton(query, heads, rows, dynamic, choice, out)
        case "cpp":
            extension.load()
            tables = (heads.table, heads.lens, rows.slots, dynamic)
            numbers = (heads.page_tokens, *choice)
            found = (out.table, out.lens)
            torch.ops.budgetkv.retrieve(query, heads.pool.digests, *tables, *numbers, *found)
