"""The only join of policy and ops: score, ask the policy, select, compact, digest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.policy import Observation, Policy, PolicyOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.worker.bank import Rotary
    from vllm_budgetkv.worker.requests import RequestState
    from vllm_budgetkv.worker.tables import HeadTables


@dataclass(frozen=True)
class Compressor:
    """Compresses one layer of one request to its budget.

    Args:
        tables: page tables and the pool; mutated.
        policy: says which tokens stay.
        options: knobs of the policy.
        quota: says how many tokens stay.
        scales: softmax scale of each layer.
        rotaries: rotary embedding of each layer; empty for a model without one.
        poison: fill freed pages with NaN.
    """

    tables: HeadTables
    policy: Policy
    options: PolicyOptions
    quota: Quota
    scales: Mapping[int, float]
    rotaries: Mapping[int, Rotary]
    poison: bool

    def compress(
        self, request: RequestState, layer: int, longest_tokens: int, seen_tokens: int, last: bool
    ) -> None:
        """Keep what the policy keeps of one layer and free the pages behind it.

        Args:
            request: the request; its `record` takes the time.
            layer: layer index.
            longest_tokens: upper bound of the layer's longest head.
            seen_tokens: tokens of the request so far.
            last: whether decode follows, so that digests are needed.
        """
        started_seconds = time.perf_counter()
        tables, slot = self.tables, request.slot
        table, lens = tables.page_table[slot, layer], tables.lens[slot, layer]
        observation = self._observe(request, layer, longest_tokens, seen_tokens)
        kept = self.policy.retain(observation)
        keep = ops.select(kept.scores, kept.tiers, lens, kept.budgets)
        stack = (tables.free_pages[slot], tables.num_free[slot : slot + 1])
        ops.compact(keep, kept.scores, tables.pool, table, lens, *stack, poison=self.poison)
        tables.is_static[slot, layer] = kept.is_static
        if last and self._retrieves:
            ops.digest(tables.pool, table, lens)
            tables.retrieves[slot, layer] = ~kept.is_static
        request.record.compression_seconds += time.perf_counter() - started_seconds

    def compact_all(self, request: RequestState) -> None:
        """Compress every layer before a decode step, because the growth would pass the quota."""
        seen_tokens = request.computed_tokens
        longest_tokens = request.longest_head_tokens(self.quota, 0)
        for layer in range(self.tables.num_layers):
            self.compress(request, layer, longest_tokens, seen_tokens, last=True)
        self.finish(request, last=True)

    def finish(self, request: RequestState, last: bool) -> None:
        """Note that all layers of a request have been compressed."""
        request.grown_tokens = 0
        request.has_classes = True
        request.retrieves = last and self._retrieves
        request.record.compressions += 1

    @property
    def _retrieves(self) -> bool:
        return self.policy.needs_scores and self.options.retrieval_ratio < 1

    def _observe(
        self, request: RequestState, layer: int, longest_tokens: int, seen_tokens: int
    ) -> Observation:
        tables, slot = self.tables, request.slot
        lens = tables.lens[slot, layer]
        mass = topk_mass = value_norms = None
        if self.policy.needs_scores and request.bank is not None and request.bank.size:
            assert request.next_position is not None
            probe = request.bank.probe(layer, request.next_position, self.rotaries.get(layer))
            mass, topk_mass, value_norms, positions = ops.score(
                probe,
                tables.pool,
                tables.page_table[slot, layer],
                lens,
                self.scales[layer],
                self.options.top_k_tokens(longest_tokens),
                self.options.sink_tokens,
                longest_tokens,
            )
        else:
            positions = self._positions(slot, layer, longest_tokens)
        span_ids, is_vision = request.spans.lookup(positions)
        return Observation(
            mass=mass,
            topk_mass=topk_mass,
            value_norms=value_norms,
            positions=positions,
            lens=lens,
            is_vision=is_vision,
            span_ids=span_ids,
            seen_tokens=seen_tokens,
            protected_position=request.spans.trailing_frame_start(seen_tokens),
            budget_tokens=self.quota.budget_tokens,
            max_head_tokens=self.quota.max_head_tokens,
            was_static=tables.is_static[slot, layer] if request.has_classes else None,
            text_tokens=request.spans.count_text(seen_tokens),
            span_tokens=request.spans.span_tokens(seen_tokens),
        )

    def _positions(self, slot: int, layer: int, longest_tokens: int) -> torch.Tensor:
        """int32 [H, n]: logical index of every token that the layer holds, -1 beyond."""
        tables = self.tables
        page_tokens = tables.pool.layout.page_tokens
        num_pages = -(-longest_tokens // page_tokens)
        pages = tables.page_table[slot, layer, :, :num_pages]
        positions = tables.pool.positions[pages.long()].flatten(1)[:, :longest_tokens]
        index = torch.arange(longest_tokens, device=positions.device)
        return positions.masked_fill(index >= tables.lens[slot, layer][:, None], -1)
