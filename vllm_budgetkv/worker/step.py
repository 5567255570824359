"""One step of the batch: the rows in order, and what each layer does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv import ops
from vllm_budgetkv.quota import ceil_div
from vllm_budgetkv.worker.bank import plan_writes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_budgetkv.worker.bank import BankWrite, ProbeBank
    from vllm_budgetkv.worker.cache import BudgetCache
    from vllm_budgetkv.worker.requests import RequestState, RowPlan
    from vllm_budgetkv.worker.rows import Rows

    BankEntry = tuple[RequestState, ProbeBank, BankWrite]


@dataclass(frozen=True)
class Step:
    """Device tensors and host plans of one batch. R rows, T query tokens.

    A decode step, one generated token in every row, runs its layers without allocating and without
    asking the host, so that a CUDA graph can replay them: what differs between two steps lies in
    `rows` and in the tables. Before, `reserve` takes the pages of all layers; behind it, the cache
    moves the queries that the layers left in its buffers to the requests' banks.

    Args:
        cache: the worker's cache.
        plans: what each row does, in the order of the rows; none in a step to capture.
        starts: first query token of each row, and T.
        rows: the rows on the device.
        is_decode: whether every row decodes.
        writes: text tokens that enter a bank, with the request and its bank.
        num_retrieving_rows: leading rows of one token that may read some of their pages only.
    """

    cache: BudgetCache
    plans: list[RowPlan]
    starts: list[int]
    rows: Rows
    is_decode: bool
    writes: list[BankEntry]
    num_retrieving_rows: int

    @classmethod
    def build(cls, cache: BudgetCache, row_ids: Sequence[str], query_start: torch.Tensor) -> Step:
        """Order the cache's plans as the batch's rows; a decode step takes its pages.

        Args:
            cache: the worker's cache, whose `plans` cover every row; its rows and tables change.
            row_ids: request id of each row.
            query_start: int [R + 1] on the host.
        """
        plans = [cache.plans[request_id] for request_id in row_ids]
        starts = query_start.tolist()
        cache.rows.fill(plans, starts)
        rows = cache.rows.first(len(plans))
        is_decode = all(plan.is_decode for plan in plans)
        if is_decode:
            cache.tables.reserve(rows.slots, rows.shared)
            rows.shared.zero_()
        return cls(
            cache=cache,
            plans=plans,
            starts=starts,
            rows=rows,
            is_decode=is_decode,
            writes=_bank_writes(plans, [*range(len(plans))] if is_decode else starts),
            num_retrieving_rows=_count_retrieving_rows(plans),
        )

    @classmethod
    def to_capture(cls, cache: BudgetCache, num_rows: int) -> Step:
        """A decode step of any `num_rows` requests: its layers read the tensors of the cache.

        Until a step is built, its rows have no tokens and change nothing.

        Raises:
            ValueError: the cache has room for fewer rows.
        """
        if num_rows > (capacity := len(cache.rows.slots)):
            raise ValueError(
                f"a graph of {num_rows} rows was asked for, but --max-num-seqs is {capacity}: "
                "lower --max-cudagraph-capture-size"
            )
        cache.rows.fill([], [0])
        return cls(
            cache=cache,
            plans=[],
            starts=[*range(num_rows + 1)],
            rows=cache.rows.first(num_rows),
            is_decode=True,
            writes=[],
            num_retrieving_rows=num_rows if cache.compressor.retrieves else 0,
        )

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
            row_positions = axes[:, self.starts[row] : self.starts[row + 1]]
            plan.request.position_offset = row_positions.max() + 1 - plan.stop_tokens

    def run_layer(
        self,
        layer_name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float,
    ) -> None:
        """Append, attend and compress one layer. Mutates `out`, the pool and the tables.

        Args:
            layer_name: vLLM's name of the layer.
            query: [T, Hq, D]. key, value: [T, H, D]. out: [T, Hq, D]. T may be padded.
            scale: of the logits.
        """
        cache, tables, rows = self.cache, self.cache.tables, self.rows
        layer = cache.layer_index[layer_name]
        num_tokens = self.starts[-1]
        query, key, value, out = (x[:num_tokens] for x in (query, key, value, out))
        table, lens = tables.page_table[:, layer], tables.lens[:, layer]
        stack = (tables.free_pages, tables.num_free)
        where = (rows.slots, rows.query_start, rows.first_position, rows.shared)
        ops.append(key, value, tables.pool, table, lens, *stack, *where)
        self._attend(layer, query, out, scale)
        if self.is_decode:
            if cache.buffers.queries.numel():
                cache.buffers.queries[layer, :num_tokens].copy_(query)
            return
        for _, bank, write in self.writes:
            bank.write_queries(write, layer, query)
        for plan in self.plans:
            if plan.compress:
                request = plan.request
                longest_tokens = request.longest_head_tokens(plan.num_tokens)
                cache.compressor.compress(
                    request, [layer], longest_tokens, plan.stop_tokens, last=plan.ends_prefill
                )

    def finish(self) -> None:
        """Move a decode step's queries from the buffers of the cache to the banks."""
        if not self.is_decode:
            return
        for request, bank, write in self.writes:
            assert request.position_offset is not None
            position = request.position_offset + request.computed_tokens
            bank.take(write, self.cache.buffers.queries, position)

    def _attend(self, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        tables, split = self.cache.tables, self.num_retrieving_rows
        table, lens = tables.page_table[:, layer], tables.lens[:, layer]
        if split:
            self._attend_retrieved(layer, query[:split], out[:split], scale)
        if split < len(self.rows.slots):
            rows = self.rows.behind(split) if split else self.rows
            where = (rows.slots, rows.query_start)
            ops.attend(query[split:], tables.pool, table, lens, *where, out[split:], scale)

    def _attend_retrieved(
        self, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float
    ) -> None:
        """Decode rows whose dynamic heads read their best pages only (Quest, ArkVale)."""
        tables, options = self.cache.tables, self.cache.compressor.options
        num_rows, page_tokens = query.shape[0], tables.pool.layout.page_tokens
        # what decode appended since the last compaction has no digest yet, so it is always read
        grown_pages = ceil_div(self.cache.quota.decode_interval_tokens, page_tokens) + 1
        buffers = self.cache.buffers
        read = (buffers.read_table[:num_rows], buffers.read_lens[:num_rows])
        ops.retrieve(
            query,
            tables.pool,
            tables.page_table[:, layer],
            tables.lens[:, layer],
            self.rows.slots[:num_rows],
            tables.retrieves[:, layer],
            options.retrieval_ratio,
            options.retrieval_sink_pages(page_tokens),
            max(grown_pages, options.retrieval_window_pages(page_tokens)),
            *read,
        )
        own, starts = buffers.numbers[:num_rows], self.rows.query_start[: num_rows + 1]
        ops.attend(query, tables.pool, *read, own, starts, out, scale)


def _bank_writes(plans: list[RowPlan], starts: list[int]) -> list[BankEntry]:
    entries = []
    for plan, start in zip(plans, starts, strict=False):
        bank = plan.request.bank
        if bank is not None and plan.bank_positions:
            shift = start - plan.request.computed_tokens
            tokens = [position + shift for position in plan.bank_positions]
            entries.append((plan.request, bank, tokens))
    writes = plan_writes([(bank, tokens) for _, bank, tokens in entries])
    return [
        (request, bank, write) for (request, bank, _), write in zip(entries, writes, strict=True)
    ]


def _count_retrieving_rows(plans: list[RowPlan]) -> int:
    """Leading one-token rows, if any of them retrieves; 0 otherwise."""
    count = next((row for row, plan in enumerate(plans) if plan.num_tokens != 1), len(plans))
    return count if any(plan.request.retrieves for plan in plans[:count]) else 0
