"""`retrieve`: the pages that a dynamic head reads in one decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.retrieve import retrieve as retrieve_reference
from vllm_budgetkv.ops.require import require

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def retrieve(
    query: torch.Tensor,
    pool: PagePool,
    table: torch.Tensor,
    lens: torch.Tensor,
    slots: torch.Tensor,
    dynamic: torch.Tensor,
    keep_ratio: float,
    sink_pages: int,
    window_pages: int,
    out_table: torch.Tensor,
    out_lens: torch.Tensor,
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
        pool: the head-pages; the digests of sink and window pages are not needed.
        table: int32 [S, H, W], pages of each head.
        lens: int32 [S, H], tokens of each head.
        slots: int32 [R], request slot of each row.
        dynamic: bool [S, H], heads that retrieve.
        keep_ratio: share of the pages to keep, in (0, 1].
        sink_pages: first pages, always kept.
        window_pages: last pages, always kept, at least 1 (they may have no digest yet).
        out_table: int32 [R, H, W], chosen pages in ascending order, then -1; mutated.
        out_lens: int32 [R, H], tokens of the chosen pages; mutated.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    require("table", table, torch.int32, (None, None, None))
    require("slots", slots, torch.int32, (None,))
    num_slots, num_heads, width_pages = table.shape
    num_rows = slots.shape[0]
    require("query", query, query.dtype, (num_rows, None, pool.layout.head_size))
    require("lens", lens, torch.int32, (num_slots, num_heads))
    require("dynamic", dynamic, torch.bool, (num_slots, num_heads))
    require("out_table", out_table, torch.int32, (num_rows, num_heads, width_pages))
    require("out_lens", out_lens, torch.int32, (num_rows, num_heads))
    if query.shape[1] % num_heads:
        raise ValueError(
            f"query has {query.shape[1]} heads; pass a multiple of the {num_heads} KV heads"
        )
    if not 0.0 < keep_ratio <= 1.0 or sink_pages < 0 or window_pages < 1:
        raise ValueError(
            f"keep_ratio {keep_ratio}, sink_pages {sink_pages}, window_pages {window_pages}: "
            "keep_ratio must be in (0, 1], sink_pages at least 0, window_pages at least 1"
        )
    numbers = (keep_ratio, sink_pages, window_pages)
    tables, outputs = (table, lens, slots, dynamic), (out_table, out_lens)
    match backend.of(query):
        case "reference":
            retrieve_reference(query, pool, *tables, *numbers, *outputs)
        case "triton":
            from vllm_budgetkv.ops.triton.retrieve import retrieve as retrieve_triton

            retrieve_triton(query, pool, *tables, *numbers, *outputs)
        case "cpp":
            extension.load()
            sizes = (pool.layout.page_tokens, *numbers)
            torch.ops.budgetkv.retrieve(query, pool.digests, *tables, *sizes, *outputs)
