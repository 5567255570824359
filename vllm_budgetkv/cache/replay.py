"""What a prompt takes over from host memory: its chunks once more, without the model.

A layer's keys and values come from host memory instead of from its projections; everything else is
as in a prefill, chunk by chunk and layer by layer: the tokens are appended, the request's own probe
scores them, the policy drops what it drops. So the quota holds as it does there, and a request
holds what it would hold if it had computed these tokens itself.

Where the tokens that are taken over end inside a chunk, its first part is appended by each layer in
front of the rest (`Lead`): the chunk is attended to and compressed as a whole, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from vllm_budgetkv import ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.cache.compressor import Compressor
    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.rows import Rows
    from vllm_budgetkv.cache.tables import HeadTables
    from vllm_budgetkv.cache.tier import HostTier


@dataclass(frozen=True)
class Lead:
    """Tokens of some requests that every layer takes from host memory.

    Args:
        rows: a row for each request.
        key, value: [T, H, D], written for each layer anew.
        tables: which pages each head holds.
        tier: what host memory keeps.
    """

    rows: Rows
    key: torch.Tensor
    value: torch.Tensor
    tables: HeadTables
    tier: HostTier

    def append(self, layer: int) -> None:
        """Append the tokens to what the heads of a layer hold."""
        tables, rows = self.tables, self.rows
        ops.load(self.key, self.value, rows, self.tier.layer(layer))
        ops.append(self.key, self.value, tables.layer(layer), tables.stack, rows)


@dataclass(frozen=True)
class Replay:
    """Fills the heads of a request with what host memory keeps of its prompt.

    Args:
        tables: which pages each head holds.
        tier: what host memory keeps.
        compressor: compresses one layer of one request.
        rows: of a lead; there are as many as slots.
    """

    tables: HeadTables
    tier: HostTier
    compressor: Compressor
    rows: Rows

    def run(self, request: RequestState) -> None:
        """Let a request that has seen nothing hold what it takes over."""
        assert request.host is not None
        for stop_tokens in request.host.stops:
            largest = self._largest(request, stop_tokens)
            self._run_chunk(request, stop_tokens, largest + 1, last=False)
        if rest_tokens := request.host.num_tokens - request.computed_tokens:
            request.lead(rest_tokens)

    def again(self, request: RequestState) -> None:
        """Choose anew what stays of a prompt whose chunks are all behind it.

        Its probe, the question read where it stands, asks every chunk from there.
        """
        assert request.position_offset is not None
        end_tokens, chunk_tokens = request.computed_tokens, request.quota.chunk_tokens
        next_position = request.position_offset + end_tokens
        if self.compressor.poison:
            self.tables.pool.poison(self.tables.pages_of(request.blocks).flatten())
        request.restart()
        self.tables.restart(request.slot, request.blocks)
        for start_tokens in range(0, end_tokens, chunk_tokens):
            stop_tokens = min(start_tokens + chunk_tokens, end_tokens)
            self._run_chunk(request, stop_tokens, next_position, last=stop_tokens == end_tokens)

    def _largest(self, request: RequestState, stop_tokens: int) -> torch.Tensor:
        return self.tier.largest_position(request.slot, request.computed_tokens, stop_tokens)

    @record_function("budgetkv::replay")
    def _run_chunk(
        self, request: RequestState, stop_tokens: int, next_position: torch.Tensor, *, last: bool
    ) -> None:
        """Append a chunk and compress it, asked from a rotary position."""
        num_tokens = stop_tokens - request.computed_tokens
        compresses = request.quota.compresses_after(stop_tokens, request.prompt_tokens)
        if compresses:
            self.compressor.share(request)
        request.stand_at(next_position - stop_tokens)
        lead = self._lead([request], [num_tokens], [request.computed_tokens])
        for layer in range(self.tables.num_layers):
            lead.append(layer)
            if compresses:
                self.compressor.compress(request, [layer], num_tokens, last=last)
        request.advance(num_tokens)
        if compresses:
            self.compressor.finished(request, last=last)

    def lead(self, requests: Sequence[RequestState]) -> Lead | None:
        """What begins the chunks of some requests; None if nothing does."""
        leading = [request for request in requests if request.lead_tokens]
        if not leading:
            return None
        counts = [request.lead_tokens for request in leading]
        return self._lead(leading, counts, [request.held_tokens for request in leading])

    def _lead(
        self, requests: Sequence[RequestState], counts: Sequence[int], positions: Sequence[int]
    ) -> Lead:
        starts = list(accumulate(counts, initial=0))
        self.rows.fill_from(requests, starts, positions)
        layout = self.tables.pool.layout
        shape = (starts[-1], self.tables.num_heads, layout.head_size)
        key, value = (
            torch.empty(shape, dtype=layout.dtype, device=self.tables.lens.device) for _ in "kv"
        )
        return Lead(self.rows.first(len(requests)), key, value, self.tables, self.tier)
