"""The only join of policy and ops: score, ask the policy, select, merge, compact, digest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.layer_budgets import LayerBudgets
from vllm_budgetkv.policy import Observation, Policy, PolicyOptions, Retention
from vllm_budgetkv.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        self,
        request: RequestState,
        layers: Sequence[int],
        longest_tokens: int,
        seen_tokens: int,
        last: bool,
    ) -> None:
        """Keep what the policy keeps of some layers and free the pages behind it.

        The policy is asked layer by layer; the pages of all of them move together.

        Args:
            request: the request; its `record` takes the time.
            layers: layer indices, one behind the other.
            longest_tokens: upper bound of their longest head.
            seen_tokens: tokens of the request so far.
            last: whether decode follows, so that digests are needed.
        """
        started_seconds = time.perf_counter()
        tables, slot = self.tables, request.slot
        seen = [self._observe(request, layer, longest_tokens, seen_tokens) for layer in layers]
        kept = [self.policy.retain(observation) for observation in seen]
        # neighbours in the tables, so that their heads are the rows of one view
        rows = slice(layers[0], layers[-1] + 1)
        table, lens = tables.page_table[slot, rows].flatten(0, 1), tables.lens[slot, rows].flatten()
        scores, tiers, budgets, is_static = (
            join([getattr(one, name) for one in kept])
            for name in ("scores", "tiers", "budgets", "is_static")
        )
        keep = ops.select(scores, tiers, lens, budgets)
        self._merge(request, layers, keep, seen, kept)
        stack = (tables.free_pages[slot], tables.num_free[slot : slot + 1])
        ops.compact(keep, scores, tables.pool, table, lens, *stack, poison=self.poison)
        is_static = is_static.view(len(layers), -1)
        tables.is_static[slot, rows] = is_static
        if last and self.retrieves:
            ops.digest(tables.pool, table, lens)
            tables.retrieves[slot, rows] = ~is_static
        request.record.compression_seconds += time.perf_counter() - started_seconds

    def _merge(
        self,
        request: RequestState,
        layers: Sequence[int],
        keep: torch.Tensor,
        seen: list[Observation],
        kept: list[Retention],
    ) -> None:
        """Merge what goes into what stays, a layer at a time, since its heads are compared."""
        tables, slot = self.tables, request.slot
        parts = keep.chunk(len(layers))
        for layer, part, observation, retention in zip(layers, parts, seen, kept, strict=True):
            if retention.merge is not None:
                where = (tables.page_table[slot, layer], tables.lens[slot, layer])
                how = (retention.merge, observation.seen_tokens)
                ops.merge(part, tables.pool, *where, observation.is_vision, *how)

    def compact_all(self, request: RequestState) -> None:
        """Compress all layers before a decode step, because the growth would pass the quota."""
        layers = range(self.tables.num_layers)
        longest_tokens = request.longest_head_tokens(self.quota, 0)
        self.compress(request, layers, longest_tokens, request.computed_tokens, last=True)
        self.finish(request, last=True)

    def finish(self, request: RequestState, last: bool) -> None:
        """Note that all layers of a request have been compressed."""
        request.grown_tokens = 0
        request.has_classes = True
        request.retrieves = last and self.retrieves
        request.record.compressions += 1

    @property
    def retrieves(self) -> bool:
        """Whether dynamic heads read only some of their pages in decode."""
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
        mass = topk_mass = value_norms = keys = contrast = frame_ids = patch_ids = None
        if policy.needs_scores and request.bank is not None and request.bank.size:
            scores = self._score(request, request.bank, layer, longest_tokens, seen_tokens)
            mass, topk_mass, value_norms, positions = scores
        else:
            positions = self._gather(pool.positions, request, layer, longest_tokens, -1)
        if policy.needs_value_norms and value_norms is None:
            values = self._gather(pool.values, request, layer, longest_tokens, 0)
            value_norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        if policy.needs_keys:
            keys = self._gather(pool.keys, request, layer, longest_tokens, 0)
        if policy.needs_contrast:
            table = tables.page_table[request.slot, layer]
            contrast = ops.contrast(pool, table, lens, longest_tokens)
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
            contrast=contrast,
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
        self,
        request: RequestState,
        bank: ProbeBank,
        layer: int,
        longest_tokens: int,
        seen_tokens: int,
    ) -> ops.Scores:
        """Attention of the request's probe to what the layer holds."""
        assert request.position_offset is not None
        # recent queries are used where they are; the axes of vision differ, so none could be turned
        is_turned = self.policy.probe_source != "recent"
        rotary = self.rotaries.get(layer) if is_turned else None
        return ops.score(
            bank.probe(layer, request.position_offset + seen_tokens, rotary),
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


def join(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all tensors; the tensor itself if there is but one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
