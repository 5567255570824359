"""Tensors of a step that stay at their address, so that a captured graph finds the next step's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.ops import BatchRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.cache.requests import RequestState, RowPlan


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
        requests = [plan.request for plan in plans]
        self.fill_from(requests, starts, [request.computed_tokens for request in requests])

    def fill_from(
        self, requests: Sequence[RequestState], starts: Sequence[int], positions: Sequence[int]
    ) -> None:
        """The same for tokens of requests that begin at any of their positions."""
        padding = len(self.slots) - len(requests)
        numbers = [
            *[*(request.slot for request in requests), *[0] * padding],
            *[*starts, *[starts[-1]] * padding],
            *[*positions, *[0] * padding],
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
