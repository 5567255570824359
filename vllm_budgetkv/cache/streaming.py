"""Chunks of a prompt that attend to all tokens in front of them, as host memory keeps them.

What a quota dropped is still in host memory, so a chunk of a later part of the prompt can see it:
blocks of one layer are copied into free pages of the request, a piece at a time, and what the
chunk makes of each piece is joined by its weight. So keys and values of every layer are those of
the full cache, and no more pages are held than before: the pages are those in which the request's
output will grow, and decode has not begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.requests import RequestState, RowPlan
    from vllm_budgetkv.cache.tables import HeadTables


@dataclass(frozen=True)
class Stream:
    """Last tokens of a row that attend to all tokens of their prompt up to themselves.

    Args:
        request: it has seen `start_tokens` before this row.
        tokens: of the batch, those that do.
        start_tokens, stop_tokens: of the prompt, the row's.
        rows: these tokens alone, in slot 0.
    """

    request: RequestState
    tokens: slice
    start_tokens: int
    stop_tokens: int
    rows: ops.BatchRows


@dataclass(frozen=True)
class Streaming:
    """Attention over what host memory keeps of a prompt.

    Args:
        tables: which pages each head holds, and which are free.
        recaller: knows host memory and what is still being written there.
        scales: of the logits, by the index of the layer.
        value_units: what a stored value of 1 stands for, by the index of the layer.
        poison: fill pages with NaN again when they have been read.
    """

    tables: HeadTables
    recaller: Recaller
    scales: Mapping[int, float]
    value_units: Mapping[int, float]
    poison: bool

    def open(self, plans: Sequence[RowPlan], starts: Sequence[int]) -> list[Stream]:
        """The rows of a batch that attend to more than their request holds.

        Args:
            plans: of all rows.
            starts: first query token of each row, and their number.
        """
        return [
            self._stream(plan, starts[row + 1])
            for row, plan in enumerate(plans)
            if plan.streaming_tokens
        ]

    def _stream(self, plan: RowPlan, end: int) -> Stream:
        count, stop_tokens = plan.streaming_tokens, plan.stop_tokens
        numbers = [0, 0, count, stop_tokens - count]
        uploaded = upload(numbers, torch.int32, self.tables.lens.device)
        rows = ops.BatchRows(uploaded[:1], uploaded[1:3], uploaded[3:], uploaded[:1].bool())
        computed_tokens = plan.request.computed_tokens
        return Stream(plan.request, slice(end - count, end), computed_tokens, stop_tokens, rows)

    @record_function("budgetkv::stream")
    def attend(self, stream: Stream, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        """Attend from a row's tokens; host memory keeps this layer of them already.

        Args:
            stream: the row.
            layer: index of the layer.
            query: [T, Hq, D] of the batch. out: as `query`; written where the row's tokens are.
        """
        query = query[stream.tokens]
        width, num_heads = stream.request.quota.piece_pages, self.tables.num_heads
        pages = self.tables.lend(stream.request.slot, num_heads * width, checked=self.poison)
        pages = pages.view(num_heads, width)
        mean, weight = self._piece(stream, layer, pages, 0, query)
        num_pages = ceil_div(stream.stop_tokens, self.tables.pool.layout.page_tokens)
        for first_page in range(width, num_pages, width):
            other, other_weight = self._piece(stream, layer, pages, first_page, query)
            both = torch.logaddexp(weight, other_weight)
            mean *= (weight - both).exp_()[..., None]
            mean += other.mul_((other_weight - both).exp_()[..., None])
            weight = both
        out[stream.tokens] = mean.mul_(self.value_units[layer]).to(out.dtype)
        if self.poison:
            self.tables.pool.poison(pages.flatten())

    def _piece(
        self, stream: Stream, layer: int, pages: torch.Tensor, first_page: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens make of one piece: the mean of its values [t, Hq, D], and its weight."""
        tier, layout = self.recaller.tier.layer(layer), self.tables.pool.layout
        first_token = first_page * layout.page_tokens
        num_tokens = min(pages.shape[1] * layout.page_tokens, stream.stop_tokens - first_token)
        if first_token + num_tokens > stream.start_tokens:
            # the row's own tokens may still be on their way
            self.recaller.join()
        pages = pages[:, : ceil_div(num_tokens, layout.page_tokens)]
        ops.stage(pages, self.tables.pool, stream.request.slot, first_page, tier)
        lens = self.tables.lens.new_full((1, len(pages)), num_tokens)
        heads = ops.PagedHeads(self.tables.pool, pages[None], lens)
        mean = torch.empty_like(query, dtype=torch.float32)
        weight = mean.new_empty(query.shape[:2])
        ops.attend_part(query, heads, stream.rows, first_token, mean, weight, self.scales[layer])
        return mean, weight
