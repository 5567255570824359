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
    from vllm_budgetkv.worker.bank import Rotary
    from vllm_budgetkv.worker.requests import RequestState
    from vllm_budgetkv.worker.tables import HeadTables

# of `Retention`, by what a row of them is
TOKEN_FIELDS, HEAD_FIELDS = ("scores", "tiers"), ("budgets", "is_static")


@dataclass(frozen=True)
class Compressor:
    """Compresses one layer of one request to its budget.

    Args:
        tables: page tables and the pool; mutated.
        policy: says which tokens stay.
        options: knobs of the policy.
        scales: softmax scale of each layer.
        rotaries: rotary embedding of each layer; empty for a model without one.
        poison: fill freed pages with NaN.
    """

    tables: HeadTables
    policy: Policy
    options: PolicyOptions
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

        The policy is asked layer by layer unless it takes several; their pages move together.

        Args:
            request: the request; its `record` takes the time.
            layers: layer indices, one behind the other.
            longest_tokens: upper bound of their longest head.
            seen_tokens: tokens of the request so far.
            last: whether decode follows, so that digests are needed.
        """
        started_seconds = time.perf_counter()
        tables, slot = self.tables, request.slot
        seen = [
            self._observe(request, group, longest_tokens, seen_tokens)
            for group in self._groups(request, layers)
        ]
        kept = [self.policy.retain(observation) for observation in seen]
        # neighbours in the tables, so that their heads are the rows of one view
        rows = slice(layers[0], layers[-1] + 1)
        table, lens = tables.page_table[slot, rows].flatten(0, 1), tables.lens[slot, rows].flatten()
        scores, tiers = (join([getattr(one, name) for one in kept], 2) for name in TOKEN_FIELDS)
        budgets, is_static = (join([getattr(one, name) for one in kept], 1) for name in HEAD_FIELDS)
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

    def _groups(self, request: RequestState, layers: Sequence[int]) -> list[Sequence[int]]:
        """Layers that the policy is asked about at once."""
        if self.policy.takes_layers and request.layer_budgets is None:
            return [layers]
        return [[layer] for layer in layers]

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
        mode = kept[0].merge
        if mode is None:
            return
        is_vision = join([observation.is_vision for observation in seen], 2)
        parts = zip(layers, keep.chunk(len(layers)), is_vision.chunk(len(layers)), strict=True)
        for layer, part, of_vision in parts:
            where = (tables.page_table[slot, layer], tables.lens[slot, layer])
            ops.merge(part, tables.pool, *where, of_vision, mode, seen[0].seen_tokens)

    def compact_all(self, request: RequestState) -> None:
        """Compress all layers before a decode step, because the growth would pass the quota."""
        layers = range(self.tables.num_layers)
        longest_tokens = request.longest_head_tokens(0)
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

    def new_layer_budgets(self, quota: Quota) -> LayerBudgets | None:
        """Running budgets of a new request under a quota; None if all layers are equal.

        Raises:
            ValueError: the policy does not fit the model.
        """
        sizes = (self.tables.num_layers, self.tables.num_heads, quota.budget_tokens)
        desired_tokens = self.policy.layer_budgets(*sizes)
        if desired_tokens is None:
            return None
        return LayerBudgets(desired_tokens, quota.budget_tokens, quota.max_head_tokens)

    def _observe(
        self,
        request: RequestState,
        layers: Sequence[int],
        longest_tokens: int,
        seen_tokens: int,
    ) -> Observation:
        """What the policy is told of one layer, or of several at once."""
        tables, policy, spans = self.tables, self.policy, request.spans
        probes = self._probes(request, layers, seen_tokens)
        measured = stack(
            [
                self._measure(request, layer, probe, longest_tokens)
                for layer, probe in zip(layers, probes, strict=True)
            ]
        )
        positions = measured["positions"]
        frame_ids = patch_ids = None
        if policy.needs_frames:
            frame_ids, patch_ids = spans.lookup_frames(positions)
        span_ids, is_vision = spans.lookup(positions)
        where = (request.slot, place_of(layers))
        return Observation(
            **measured,
            lens=tables.lens[where],
            is_vision=is_vision,
            span_ids=span_ids,
            seen_tokens=seen_tokens,
            protected_position=spans.trailing_frame_start(seen_tokens),
            budget_tokens=self._claim_tokens(request, layers[0]),
            max_head_tokens=request.quota.max_head_tokens,
            was_static=tables.is_static[where] if request.has_classes else None,
            text_tokens=spans.count_text(seen_tokens),
            span_tokens=spans.span_tokens(seen_tokens),
            frame_ids=frame_ids,
            patch_ids=patch_ids,
            num_patches=spans.num_patches if policy.needs_frames else 0,
            layer=layers[0],
        )

    def _measure(
        self, request: RequestState, layer: int, probe: torch.Tensor | None, longest_tokens: int
    ) -> dict[str, torch.Tensor]:
        """What is computed from the pages of one layer: fields of `Observation`."""
        tables, policy, pool = self.tables, self.policy, self.tables.pool
        if probe is not None:
            found = self._score(request, probe, layer, longest_tokens)._asdict()
        else:
            positions = self._gather(pool.positions, request, layer, longest_tokens, -1)
            found = {"positions": positions}
        if policy.needs_value_norms and probe is None:
            values = self._gather(pool.values, request, layer, longest_tokens, 0)
            norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            found["value_norms"] = norms
        if policy.needs_keys:
            found["keys"] = self._gather(pool.keys, request, layer, longest_tokens, 0)
        if policy.needs_contrast:
            where = (tables.page_table[request.slot, layer], tables.lens[request.slot, layer])
            found["contrast"] = ops.contrast(pool, *where, longest_tokens)
        return found

    def _probes(
        self, request: RequestState, layers: Sequence[int], seen_tokens: int
    ) -> Sequence[torch.Tensor | None]:
        """The request's probe in each layer, [M, Hq, D], turned to stand behind its tokens."""
        bank = request.bank
        if not self.policy.needs_scores or bank is None or not bank.size:
            return [None] * len(layers)
        assert request.position_offset is not None
        position = request.position_offset + seen_tokens
        # recent queries are used where they are; the axes of vision differ, so none could be turned
        is_turned = self.policy.probe_source != "recent"
        rotaries = [self.rotaries.get(layer) if is_turned else None for layer in layers]
        if len(layers) > 1 and all(rotary is rotaries[0] for rotary in rotaries):
            return bank.probe(place_of(layers), position, rotaries[0]).unbind()
        pairs = zip(layers, rotaries, strict=True)
        return [bank.probe(layer, position, rotary) for layer, rotary in pairs]

    def _claim_tokens(self, request: RequestState, layer: int) -> int:
        """Tokens per head, on average, that the layer may keep."""
        if request.layer_budgets is None:
            return request.quota.budget_tokens
        return request.layer_budgets.claim(layer)

    def _score(
        self, request: RequestState, probe: torch.Tensor, layer: int, longest_tokens: int
    ) -> ops.Scores:
        """Attention of a probe to what the layer holds."""
        return ops.score(
            probe,
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


def place_of(layers: Sequence[int]) -> int | slice:
    """Index of one layer in the tables, or a slice of neighbours."""
    return layers[0] if len(layers) == 1 else slice(layers[0], layers[-1] + 1)


def stack(layers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of one layer as they are, of several with the layers in front."""
    if len(layers) == 1:
        return layers[0]
    return {name: torch.stack([found[name] for found in layers]) for name in layers[0]}


def join(tensors: list[torch.Tensor], num_dims: int) -> torch.Tensor:
    """Rows of all tensors, with their layers and heads in one dimension in front."""
    flat = [tensor.flatten(0, tensor.dim() - num_dims) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
