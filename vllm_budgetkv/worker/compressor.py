"""The only join of policy and ops: score, ask the policy, select, merge, compact, digest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.layer_budgets import LayerBudgets
from vllm_budgetkv.policy import Observation, Policy, PolicyOptions
from vllm_budgetkv.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.worker.bank import ProbeBank, Rotary
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
        if kept.merge is not None:
            is_vision = observation.is_vision
            ops.merge(keep, tables.pool, table, lens, is_vision, kept.merge, seen_tokens)
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
        return self.policy.retrieves and self.options.retrieval_ratio < 1

    def new_layer_budgets(self) -> LayerBudgets | None:
        """Running budgets of a new request; None if all layers are equal.

        Raises:
            ValueError: the policy does not fit the model.
        """
        quota = self.quota
        sizes = (self.tables.num_layers, self.tables.num_heads, quota.budget_tokens)
        desired_tokens = self.policy.layer_budgets(*sizes)
        if desired_tokens is None:
            return None
        return LayerBudgets(desired_tokens, quota.budget_tokens, quota.max_head_tokens)

    def _observe(
        self, request: RequestState, layer: int, longest_tokens: int, seen_tokens: int
    ) -> Observation:
        tables, policy = self.tables, self.policy
        lens, pool = tables.lens[request.slot, layer], tables.pool
        mass = topk_mass = value_norms = keys = frame_ids = patch_ids = None
        if policy.needs_scores and request.bank is not None and request.bank.size:
            scores = self._score(request, request.bank, layer, longest_tokens)
            mass, topk_mass, value_norms, positions = scores
        else:
            positions = self._gather(pool.positions, request, layer, longest_tokens, -1)
        if policy.needs_value_norms and value_norms is None:
            values = self._gather(pool.values, request, layer, longest_tokens, 0)
            value_norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        if policy.needs_keys:
            keys = self._gather(pool.keys, request, layer, longest_tokens, 0)
        if policy.needs_frames:
            frame_ids, patch_ids = request.spans.lookup_frames(positions)
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
            budget_tokens=self._claim_tokens(request, layer),
            max_head_tokens=self.quota.max_head_tokens,
            was_static=tables.is_static[request.slot, layer] if request.has_classes else None,
            text_tokens=request.spans.count_text(seen_tokens),
            span_tokens=request.spans.span_tokens(seen_tokens),
            keys=keys,
            frame_ids=frame_ids,
            patch_ids=patch_ids,
            num_patches=request.spans.num_patches if policy.needs_frames else 0,
            layer=layer,
        )

    def _claim_tokens(self, request: RequestState, layer: int) -> int:
        """Tokens per head, on average, that the layer may keep."""
        if request.layer_budgets is None:
            return self.quota.budget_tokens
        return request.layer_budgets.claim(layer)

    def _score(
        self, request: RequestState, bank: ProbeBank, layer: int, longest_tokens: int
    ) -> ops.Scores:
        """Attention of the request's probe to what the layer holds."""
        assert request.next_position is not None
        # recent queries are used where they are; the axes of vision differ, so none could be turned
        is_turned = self.policy.probe_source != "recent"
        rotary = self.rotaries.get(layer) if is_turned else None
        return ops.score(
            bank.probe(layer, request.next_position, rotary),
            self.tables.pool,
            self.tables.page_table[request.slot, layer],
            self.tables.lens[request.slot, layer],
            self.scales[layer],
            self.options.top_k_tokens(longest_tokens),
            self.options.sink_tokens,
            longest_tokens,
        )

    def _gather(
        self,
        fields: torch.Tensor,
        request: RequestState,
        layer: int,
        longest_tokens: int,
        fill: int,
    ) -> torch.Tensor:
        """[H, n, ...]: a field [P, N, ...] of the pool of every token that the layer holds.

        `fill` stands beyond the held tokens, where the pool may hold NaN.
        """
        tables = self.tables
        num_pages = ceil_div(longest_tokens, tables.pool.layout.page_tokens)
        pages = tables.page_table[request.slot, layer, :, :num_pages]
        tokens = fields[pages.long()].flatten(1, 2)[:, :longest_tokens]
        index = torch.arange(longest_tokens, device=tokens.device)
        beyond = index >= tables.lens[request.slot, layer][:, None]
        return tokens.masked_fill(beyond.view(*beyond.shape, *[1] * (tokens.dim() - 2)), fill)
