"""What a prompt takes over from host memory: its chunks once more, without the model.

A layer's keys and values come from host memory instead of from its projections; everything else is
as in a prefill: the tokens of a chunk are appended, the request's own probe scores them, the policy
drops what it drops. But no layer waits for the one in front of it, so a layer is filled with all
chunks before the next begins. Those behind it hold nothing yet, which is room for larger chunks and
so for fewer compressions (`arithmetic/replayed.py`), and the quota holds as in a prefill.

Only chunks of what another prompt left are joined. What a request computed itself is compressed
where it was, so a preempted one holds what it held.

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
from vllm_budgetkv.arithmetic.replayed import replay_stops

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
        """Let a request that has seen nothing hold what it takes over, or nothing yet."""
        assert request.host is not None
        if request.postponed:
            self.compressor.share(request)
            request.skip(request.host.num_tokens)
            return
        if stops := request.host.stops:
            self._fill(request, stops, request.host.found_tokens)
        if rest_tokens := request.host.num_tokens - request.computed_tokens:
            request.lead(rest_tokens)

    def again(self, request: RequestState) -> None:
        """Choose what stays of a prompt whose chunks are all behind it, whatever is held of it.

        Its probe, the question read where it stands, asks every chunk from there. The last is as
        large as in a prefill, whoever may have joined those in front of it.
        """
        assert request.position_offset is not None
        end_tokens = request.quota.chunks_end(request.prompt_tokens)
        chunk_tokens = request.quota.chunk_tokens
        next_position = request.position_offset + end_tokens
        if self.compressor.poison:
            self.tables.pool.poison(self.tables.pages_of(request.blocks).flatten())
        request.restart()
        self.tables.restart(request.slot, request.blocks)
        stops = [*range(chunk_tokens, end_tokens, chunk_tokens), end_tokens]
        self._fill(request, stops, end_tokens - 1, next_position)

    def _fill(
        self,
        request: RequestState,
        stops: Sequence[int],
        joined_tokens: int,
        next_position: torch.Tensor | None = None,
    ) -> None:
        """Fill one layer behind the other, so that each has the room of those behind it.

        Args:
            request: holds nothing.
            stops: where the chunks of a prefill would end.
            joined_tokens: up to there chunks are joined, see `replay_stops`.
            next_position: rotary position from which all chunks are asked, the last for good; None
                to ask each from behind its own tokens.
        """
        if self._compresses(request, stops[-1]):
            self.compressor.share(request)
        compressions = request.compressions
        for layer in range(self.tables.num_layers):
            request.rewind(compressions)
            for stop_tokens in replay_stops(request.quota, layer, stops, joined_tokens):
                self._stand(request, stop_tokens, next_position)
                last = next_position is not None and stop_tokens == stops[-1]
                self._run_chunk(request, layer, stop_tokens, last=last)

    def _stand(
        self, request: RequestState, stop_tokens: int, next_position: torch.Tensor | None
    ) -> None:
        """Let the probe ask from a rotary position; None for that behind the chunk's tokens."""
        if next_position is None:
            start_tokens = request.computed_tokens
            largest = self.tier.largest_position(request.slot, start_tokens, stop_tokens)
            next_position = largest + 1
        request.stand_at(next_position - stop_tokens)

    def _compresses(self, request: RequestState, stop_tokens: int) -> bool:
        return request.quota.compresses_after(stop_tokens, request.prompt_tokens)

    @record_function("budgetkv::replay")
    def _run_chunk(
        self, request: RequestState, layer: int, stop_tokens: int, *, last: bool
    ) -> None:
        """Append a chunk of a layer and compress it."""
        start_tokens = request.computed_tokens
        num_tokens = stop_tokens - start_tokens
        self._lead([request], [num_tokens], [start_tokens]).append(layer)
        compresses = self._compresses(request, stop_tokens)
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
            torch.empty(shape, dtype=layout.kv_dtype, device=self.tables.lens.device) for _ in "kv"
        )
        return Lead(self.rows.first(len(requests)), key, value, self.tables, self.tier)
