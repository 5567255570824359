"""One step of the batch: the rows in order, and what each layer does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.worker.bank import BankWrite, ProbeBank
    from vllm_budgetkv.worker.cache import BudgetCache
    from vllm_budgetkv.worker.requests import RowPlan


@dataclass(frozen=True)
class Step:
    """Device tensors and host plans of one batch. R rows, T query tokens.

    Args:
        cache: the worker's cache.
        plans: what each row does, in the order of the rows.
        starts: first query token of each row, and T.
        slots: int32 [R].
        query_start: int32 [R + 1].
        first_position: int32 [R], position in its request of each row's first token.
        shared: bool [R], rows whose head-pages are shared.
        writes: which text tokens enter which bank.
        num_retrieving_rows: leading rows of one token that may read some of their pages only.
    """

    cache: BudgetCache
    plans: list[RowPlan]
    starts: list[int]
    slots: torch.Tensor
    query_start: torch.Tensor
    first_position: torch.Tensor
    shared: torch.Tensor
    writes: list[tuple[ProbeBank, BankWrite]]
    num_retrieving_rows: int

    @classmethod
    def build(cls, cache: BudgetCache, row_ids: Sequence[str], query_start: torch.Tensor) -> Step:
        """Order the cache's plans as the batch's rows.

        Args:
            cache: the worker's cache, whose `plans` cover every row.
            row_ids: request id of each row.
            query_start: int [R + 1] on the host.
        """
        plans = [cache.plans[request_id] for request_id in row_ids]
        starts = query_start.tolist()
        device = cache.tables.lens.device

        def ids(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            cache=cache,
            plans=plans,
            starts=starts,
            slots=ids([plan.request.slot for plan in plans]),
            query_start=query_start.to(device=device, dtype=torch.int32),
            first_position=ids([plan.request.computed_tokens for plan in plans]),
            shared=torch.tensor([p.request.shared for p in plans], dtype=torch.bool, device=device),
            writes=_bank_writes(plans, starts),
            num_retrieving_rows=_count_retrieving_rows(plans),
        )

    def see_positions(self, positions: torch.Tensor) -> None:
        """Take the rotary positions of the batch, before the first layer runs.

        Args:
            positions: int64 [T] or, with M-RoPE, [3, T].
        """
        axes = positions.view(-1, positions.shape[-1])
        for bank, write in self.writes:
            # text has equal ids on all axes
            bank.write_positions(write, axes[0])
        for row, plan in enumerate(self.plans):
            if plan.request.bank is not None:
                row_positions = axes[:, self.starts[row] : self.starts[row + 1]]
                plan.request.next_position = row_positions.max() + 1

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
        cache, tables = self.cache, self.cache.tables
        layer = cache.layer_index[layer_name]
        num_tokens = self.starts[-1]
        query, key, value, out = (x[:num_tokens] for x in (query, key, value, out))
        table, lens = tables.page_table[:, layer], tables.lens[:, layer]
        stack = (tables.free_pages, tables.num_free)
        rows = (self.slots, self.query_start)
        ops.append(
            key, value, tables.pool, table, lens, *stack, *rows, self.first_position, self.shared
        )
        self._attend(layer, query, out, scale)
        for bank, write in self.writes:
            bank.write_queries(write, layer, query)
        for plan in self.plans:
            if plan.compress:
                request = plan.request
                longest_tokens = request.longest_head_tokens(cache.quota, plan.num_tokens)
                cache.compressor.compress(
                    request, layer, longest_tokens, plan.stop_tokens, last=plan.ends_prefill
                )

    def _attend(self, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        tables, split = self.cache.tables, self.num_retrieving_rows
        table, lens = tables.page_table[:, layer], tables.lens[:, layer]
        if split:
            self._attend_retrieved(layer, query[:split], out[:split], scale)
        if split < len(self.plans):
            ops.attend(
                query[split:],
                tables.pool,
                table,
                lens,
                self.slots[split:],
                self.query_start[split:] - split,
                out[split:],
                scale,
            )

    def _attend_retrieved(
        self, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float
    ) -> None:
        """Decode rows whose dynamic heads read their best pages only (Quest, ArkVale)."""
        tables, options = self.cache.tables, self.cache.compressor.options
        table, lens = tables.page_table[:, layer], tables.lens[:, layer]
        num_rows, page_tokens = query.shape[0], tables.pool.layout.page_tokens
        # what decode appended since the last compaction has no digest yet, so it is always read
        grown_pages = ceil_div(self.cache.quota.decode_interval_tokens, page_tokens) + 1
        read_table = table.new_empty(num_rows, *table.shape[1:])
        read_lens = lens.new_empty(num_rows, lens.shape[1])
        ops.retrieve(
            query,
            tables.pool,
            table,
            lens,
            self.slots[:num_rows],
            tables.retrieves[:, layer],
            options.retrieval_ratio,
            options.retrieval_sink_pages(page_tokens),
            max(grown_pages, options.retrieval_window_pages(page_tokens)),
            read_table,
            read_lens,
        )
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=query.device)
        ops.attend(query, tables.pool, read_table, read_lens, rows[:-1], rows, out, scale)


def _bank_writes(plans: list[RowPlan], starts: list[int]) -> list[tuple[ProbeBank, BankWrite]]:
    writes = []
    for plan, start in zip(plans, starts, strict=False):
        bank = plan.request.bank
        if bank is not None and plan.bank_positions:
            shift = start - plan.request.computed_tokens
            tokens = [position + shift for position in plan.bank_positions]
            writes.append((bank, bank.plan_write(tokens)))
    return writes


def _count_retrieving_rows(plans: list[RowPlan]) -> int:
    """Leading one-token rows, if any of them retrieves; 0 otherwise."""
    count = next((row for row, plan in enumerate(plans) if plan.num_tokens != 1), len(plans))
    return count if any(plan.request.retrieves for plan in plans[:count]) else 0
