"""Reference of `retrieve`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.select import select
from vllm_budgetkv.ops.reference.tokens import locate_pages

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import BatchRows, PageChoice, PagedHeads


def retrieve(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    dynamic: torch.Tensor,
    choice: PageChoice,
    out: PagedHeads,
) -> None:
    """See `vllm_budgetkv.ops.retrieve.retrieve`."""
    (pool, table, lens), page_tokens = heads, heads.page_tokens
    keep_ratio, sink_pages, window_pages = choice
    slots = rows.slots.long()
    tables, row_lengths, row_dynamic = table[slots], lens[slots], dynamic[slots]
    for row in range(len(slots)):
        row_table, row_lens = tables[row], row_lengths[row]
        num_pages = (row_lens + page_tokens - 1) // page_tokens
        forced_pages = num_pages.clamp(max=sink_pages + window_pages)
        kept_pages = (num_pages.double() * keep_ratio).ceil().int().maximum(forced_pages)
        kept_pages = torch.where(row_dynamic[row], kept_pages, num_pages)

        index = torch.arange(heads.width_pages, device=table.device)
        forced = (index < sink_pages) | (index >= (num_pages - window_pages)[:, None])
        page_scores = _box_scores(query[row], pool, row_table)
        keep = select(page_scores, forced.byte(), num_pages, kept_pages)

        order = (~keep).byte().argsort(dim=1, stable=True)
        chosen = locate_pages(kept_pages, 1, heads.width_pages)
        out.table[row] = row_table.gather(1, order).masked_fill(~chosen, -1)
        out.lens[row] = row_lens - (num_pages - kept_pages) * page_tokens


def _box_scores(query: torch.Tensor, pool: PagePool, table: torch.Tensor) -> torch.Tensor:
    """float32 [H, W]: largest q.k in each page's box, for the best of the group's query heads.

    The largest of q * (c - r) and q * (c + r) is q * c + |q| * r, as no radius is negative.
    """
    digests = pool.digests[table.long().clamp(min=0)].float()
    queries = query.float().view(table.shape[0], -1, query.shape[-1])
    box_scores = torch.einsum("hgd,hwd->hgw", queries, digests[:, :, 0])
    box_scores += torch.einsum("hgd,hwd->hgw", queries.abs(), digests[:, :, 1])
    return box_scores.amax(dim=1)
