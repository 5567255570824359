"""One step of the batch: the rows in order, and what each layer does with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_budgetkv.cache.compressor import Compressor
    from vllm_budgetkv.cache.probe.probes import Entry, Probes
    from vllm_budgetkv.cache.reading import Reader
    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.replay import Lead, Replay
    from vllm_budgetkv.cache.requests import RequestState, RowPlan
    from vllm_budgetkv.cache.rows import Rows
    from vllm_budgetkv.cache.streaming import Stream, Streaming
    from vllm_budgetkv.cache.tables import HeadTables


@dataclass(frozen=True)
class Layers:
    """What the layers of every step work with.

    Args:
        index: index in the pool of each layer, by the engine's name.
        tables: which pages each head holds.
        reader: attention over them.
        probes: queries that score the cache.
        compressor: compresses one layer of one request.
        recaller: brings tokens back from host memory; None where nothing does.
        replay: takes over what host memory keeps of a prompt; None without host memory.
        streaming: attends to what host memory keeps of a prompt; None without host memory.
        units: what a stored key and a stored value of 1 stand for, by the index of the layer; empty
            where keys and values are stored as they are computed.
    """

    index: Mapping[str, int]
    tables: HeadTables
    reader: Reader
    probes: Probes
    compressor: Compressor
    recaller: Recaller | None
    replay: Replay | None
    streaming: Streaming | None
    units: Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class Step:
    """Device tensors and host plans of one batch. R rows, T query tokens. `BudgetCache` opens it.

    A decode step, one generated token in every row, runs its layers without asking the host and,
    but for quantised keys and values, without allocating, so that a CUDA graph can replay them:
    what differs between two steps lies in `rows` and in the tables. Before, the cache reserves the
    pages of all layers; behind it, the queries that the layers left behind move to the requests'
    banks.

    Args:
        layers: what its layers work with.
        plans: what each row does, in the order of the rows; none in a step to capture.
        starts: first query token of each row, and T.
        rows: the rows on the device.
        is_decode: whether every row decodes.
        writes: text tokens that enter a bank, with the request and its bank.
        num_retrieving_rows: leading rows of one token that may read some of their pages only.
        num_recalling_rows: leading rows of one token that may bring tokens back.
        lead: tokens that each layer takes from host memory first; None if there are none.
        streams: rows that attend to all of their prompt.
        ahead: int32 [T], tokens behind it that a token sees, as in a picture whose tokens attend
            both ways; None where no token sees any.
    """

    layers: Layers
    plans: Sequence[RowPlan]
    starts: Sequence[int]
    rows: Rows
    is_decode: bool
    writes: Sequence[Entry]
    num_retrieving_rows: int
    num_recalling_rows: int
    lead: Lead | None
    streams: Sequence[Stream]
    ahead: torch.Tensor | None

    def see_positions(self, positions: torch.Tensor) -> None:
        """Take the rotary positions of the batch, before the first layer runs.

        Args:
            positions: int64 [T] or, with M-RoPE, [3, T].
        """
        if self.is_decode:
            return
        axes = positions.view(-1, positions.shape[-1])
        for _, bank, write in self.writes:
            # text has equal ids on all axes
            bank.write_positions(write, axes[0])
        for row, plan in enumerate(self.plans):
            largest = axes[:, self.starts[row] : self.starts[row + 1]].amax(dim=0)
            plan.request.stand_at(self._last_position(plan.request, largest) + 1 - plan.stop_tokens)

    def _last_position(self, request: RequestState, largest: torch.Tensor) -> torch.Tensor:
        """Rotary position of the last token of a request's chunk; host memory keeps all of them.

        Args:
            request: before it advances.
            largest: int64 [n], the largest of each of its tokens in this step.
        """
        last = largest.max()
        if request.in_tier:
            assert self.layers.recaller is not None
            tier, slot, start = self.layers.recaller.tier, request.slot, request.computed_tokens
            tier.note_positions(slot, start, largest)
            if request.lead_tokens:
                led = tier.largest_position(slot, request.held_tokens, start)
                last = torch.maximum(last, led)
        return last

    def run_layer(
        self,
        layer_name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Append, attend and compress one layer. Mutates `out`, the pool and the tables.

        Args:
            layer_name: the engine's name of the layer.
            query: [T, Hq, D]. key, value: [T, H, D]. out: [T, Hq, D]. T may be padded.
        """
        tables, rows = self.layers.tables, self.rows
        layer = self.layers.index[layer_name]
        query, key, value, out = (x[: self.starts[-1]] for x in (query, key, value, out))
        if units := self.layers.units:
            key, value = ops.quantise(key, value, *units[layer])
        if self.lead is not None:
            self.lead.append(layer)
        ops.append(key, value, tables.layer(layer), tables.stack, rows)
        if (recaller := self.layers.recaller) is not None:
            if not self.is_decode:
                recaller.store(layer, rows, key, value)
            if count := self.num_recalling_rows:
                recaller.recall(layer, rows.first(count), query[:count])
        self._attend(layer, query, out)
        if self.is_decode:
            self.layers.probes.note_decode(layer, query)
            return
        for _, bank, write in self.writes:
            bank.write_queries(write, layer, query)
        for plan in self.plans:
            if plan.forgets:
                self.layers.compressor.forget(plan.request, layer, plan.num_tokens)
            elif plan.compress:
                self.layers.compressor.compress(
                    plan.request, [layer], plan.num_tokens, last=plan.ends_chunks
                )

    def _attend(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        """Attend to what is held, and to all of their prompt from the rows that stream."""
        num_rows, num_tokens = self._num_reading
        retrieving = min(self.num_retrieving_rows, num_rows)
        reading = self.rows.first(num_rows)
        ahead = None if self.ahead is None else self.ahead[:num_tokens]
        tokens = (query[:num_tokens], out[:num_tokens], ahead)
        self.layers.reader.attend(layer, reading, retrieving, *tokens)
        for stream in self.streams:
            assert self.layers.streaming is not None
            self.layers.streaming.attend(stream, layer, query, out)

    @cached_property
    def _num_reading(self) -> tuple[int, int]:
        """Rows and tokens in front of the rows that end the batch and stream from their first."""
        num_rows = len(self.rows.slots)
        if self.streams:
            others = [
                row
                for row, plan in enumerate(self.plans)
                if plan.streaming_tokens < plan.num_tokens
            ]
            num_rows = max(others, default=-1) + 1
        return num_rows, self.starts[num_rows]

    def close(self) -> None:
        """Move a decode step's queries to the banks, behind its last layer."""
        if self.is_decode:
            self.layers.probes.take_decode(self.writes)


def count_reading_rows(plans: Sequence[RowPlan]) -> tuple[int, int]:
    """Leading one-token rows, if any of them retrieves, and if any recalls; 0 otherwise."""
    count = next((row for row, plan in enumerate(plans) if plan.num_tokens != 1), len(plans))
    requests = [plan.request for plan in plans[:count]]
    retrieves = any(request.has_digests for request in requests)
    return count * retrieves, count * any(request.recalls for request in requests)
