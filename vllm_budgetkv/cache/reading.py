"""What a layer's queries read: all that their heads hold, or in decode the best pages of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.rows import Rows
    from vllm_budgetkv.cache.tables import HeadTables
    from vllm_budgetkv.policy import Policy, PolicyOptions


def reads_some_pages(policy: Policy, options: PolicyOptions) -> bool:
    """Whether decode reads only some pages of a dynamic head."""
    return policy.retrieves and options.retrieval_ratio < 1


def page_choice(policy: Policy, options: PolicyOptions, quota: Quota) -> ops.PageChoice | None:
    """Which pages a dynamic head reads in a decode step (Quest, ArkVale); None where all read all.

    Args:
        policy, options: say how much.
        quota: says how many pages have no digest yet.
    """
    if not reads_some_pages(policy, options):
        return None
    page_tokens = quota.page_tokens
    # what decode appended since the last compaction has no digest yet, so it is always read
    grown_pages = ceil_div(quota.decode_interval_tokens, page_tokens) + 1
    return ops.PageChoice(
        options.retrieval_ratio,
        options.retrieval_sink_pages(page_tokens),
        max(grown_pages, options.retrieval_window_pages(page_tokens)),
    )


@dataclass(frozen=True)
class Reader:
    """Attention of one layer over what the tables say.

    Args:
        tables: which pages each head holds.
        scales: of the logits, or how else they become weights, by the index of the layer.
        choice: what dynamic heads read in decode; None where they read everything.
        read: [R, H, W], what each row's heads read in one layer; written.
        numbers: int32 [R], 0, 1, 2, ...: each row's own place in it.
    """

    tables: HeadTables
    scales: Mapping[int, float | ops.Softmax]
    choice: ops.PageChoice | None
    read: ops.PagedHeads
    numbers: torch.Tensor

    @classmethod
    def empty(
        cls,
        tables: HeadTables,
        scales: Mapping[int, float | ops.Softmax],
        choice: ops.PageChoice | None,
        num_rows: int,
    ) -> Self:
        """A reader whose batches have at most so many rows."""
        _, _, num_heads, width_pages = tables.page_table.shape
        table = tables.page_table.new_empty(num_rows, num_heads, width_pages)
        lens = tables.lens.new_empty(num_rows, num_heads)
        read = ops.PagedHeads(tables.pool, table, lens)
        numbers = torch.arange(num_rows, dtype=torch.int32, device=lens.device)
        return cls(tables, scales, choice, read, numbers)

    def attend(
        self,
        layer: int,
        rows: Rows,
        num_retrieving: int,
        query: torch.Tensor,
        out: torch.Tensor,
        ahead: torch.Tensor | None = None,
    ) -> None:
        """Attend to what the rows' heads hold, new tokens included.

        Args:
            layer: index of the layer.
            rows: R rows of the batch.
            num_retrieving: rows in front, of one token each, that may read some pages only.
            query: [T, Hq, D]. out: [T, Hq, D], written.
            ahead: int32 [T], tokens behind it that a query sees; None where no query sees any.
        """
        heads, scale, split = self.tables.layer(layer), self.scales[layer], num_retrieving
        if split:
            self._attend_best_pages(layer, rows.first(split), query[:split], out[:split])
        if split < len(rows.slots):
            behind = rows.behind(split) if split else rows
            seen = None if ahead is None else ahead[split:]
            ops.attend(query[split:], heads, behind, out[split:], scale, seen)

    def _attend_best_pages(
        self, layer: int, rows: Rows, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert self.choice is not None
        num_rows = query.shape[0]
        read = self.read._replace(table=self.read.table[:num_rows], lens=self.read.lens[:num_rows])
        is_retrieving = self.tables.is_retrieving[:, layer]
        ops.retrieve(query, self.tables.layer(layer), rows, is_retrieving, self.choice, read)
        # what a row reads stands in its own place there, not in its request's slot
        own = rows._replace(slots=self.numbers[:num_rows])
        ops.attend(query, read, own, out, self.scales[layer])
