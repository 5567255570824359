"""Tensors of a step that stay at their address, so that a captured graph finds the next step's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import BatchRows, PagedHeads
from vllm_budgetkv.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.layout import PagePool
    from vllm_budgetkv.worker.requests import RowPlan
    from vllm_budgetkv.worker.tables import HeadTables


class Rows(BatchRows):
    """Rows of a batch. Behind the last request stand rows without tokens, in slot 0."""

    __slots__ = ()

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> Rows:
        def ids(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        shared = torch.zeros(num_rows, dtype=torch.bool, device=device)
        return cls(ids(num_rows), ids(num_rows + 1), ids(num_rows), shared)

    def fill(self, plans: Sequence[RowPlan], starts: Sequence[int]) -> None:
        """Take over a batch. `starts` are the first tokens of the rows, and all tokens."""
        padding = len(self.slots) - len(plans)
        requests = [plan.request for plan in plans]
        numbers = [
            *[*(request.slot for request in requests), *[0] * padding],
            *[*starts, *[starts[-1]] * padding],
            *[*(request.computed_tokens for request in requests), *[0] * padding],
            *[*(request.shared for request in requests), *[False] * padding],
        ]
        uploaded = upload(numbers, torch.int32, self.slots.device)
        for field, part in zip(self, uploaded.split([*map(len, self)]), strict=True):
            field.copy_(part)

    def first(self, num_rows: int) -> Rows:
        """Views of the first rows."""
        return Rows(
            self.slots[:num_rows],
            self.query_start[: num_rows + 1],
            self.first_position[:num_rows],
            self.shared[:num_rows],
        )

    def behind(self, num_rows: int) -> Rows:
        """The rows behind some of one token each, whose tokens are counted from the first's."""
        return Rows(
            self.slots[num_rows:],
            self.query_start[num_rows:] - num_rows,
            self.first_position[num_rows:],
            self.shared[num_rows:],
        )


@dataclass(frozen=True)
class DecodeBuffers:
    """What a decode step writes for itself.

    Args:
        read_table: int32 [R, H, W], pages that each row's heads read in one layer.
        read_lens: int32 [R, H], tokens in them.
        numbers: int32 [R + 1], 0, 1, 2, ...: each row's own place in these two.
        queries: [L, R, Hq, D], queries of every layer; L is 0 where no policy asks for them.
    """

    read_table: torch.Tensor
    read_lens: torch.Tensor
    numbers: torch.Tensor
    queries: torch.Tensor

    @classmethod
    def empty(
        cls, tables: HeadTables, num_rows: int, num_query_heads: int, keeps_queries: bool
    ) -> DecodeBuffers:
        layout, device = tables.pool.layout, tables.lens.device
        _, num_layers, num_heads, width_pages = tables.page_table.shape
        num_kept = num_layers if keeps_queries else 0
        return cls(
            read_table=tables.page_table.new_empty(num_rows, num_heads, width_pages),
            read_lens=tables.lens.new_empty(num_rows, num_heads),
            numbers=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            queries=torch.empty(
                num_kept,
                num_rows,
                num_query_heads,
                layout.head_size,
                dtype=layout.dtype,
                device=device,
            ),
        )

    def read(self, pool: PagePool, num_rows: int) -> PagedHeads:
        """[R, H, W]: what the first rows read, each in its own place."""
        return PagedHeads(pool, self.read_table[:num_rows], self.read_lens[:num_rows])
