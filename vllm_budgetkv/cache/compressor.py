"""The only join of policy and ops: score, ask the policy, select, merge, compact, digest."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layer_budgets import LayerBudgets
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.probe.probes import asks_probe
from vllm_budgetkv.cache.reading import reads_some_pages
from vllm_budgetkv.policy import Observation, Policy, PolicyOptions, Retention, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.probe.probes import Probes
    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.tables import HeadTables

# parts of a token
KEYS, VALUES = 0, 1
# of `Retention`, by what a row of them is
TOKEN_FIELDS, HEAD_FIELDS = ("scores", "tiers"), ("budgets", "is_static")


@dataclass(frozen=True)
class Compressor:
    """Compresses one layer of one request to its budget.

    Args:
        tables: page tables and the pool; mutated.
        options: knobs of the policy.
        probes: ask for the policies.
        scales: of each layer's logits, or how else they become weights.
        units: what a stored key and a stored value of 1 stand for, by the index of the layer; empty
            where they are stored as they are computed.
        notes_mass: whether requests note how much of the probe's attention is retained.
        poison: fill freed pages with NaN.
    """

    tables: HeadTables
    options: PolicyOptions
    probes: Probes
    scales: Mapping[int, float | ops.Softmax]
    units: Mapping[int, tuple[float, float]]
    notes_mass: bool
    poison: bool

    @record_function("budgetkv::compress")
    def compress(
        self, request: RequestState, layers: Sequence[int], num_tokens: int, last: bool
    ) -> None:
        """Keep what the policy keeps of some layers and free the pages behind it.

        The policy is asked layer by layer unless it takes several; their pages move together.

        Args:
            request: the request; it notes the time.
            layers: layer indices, one behind the other.
            num_tokens: tokens that these layers hold beyond `request.computed_tokens`.
            last: whether decode follows, so that digests are needed and recall takes its room.
        """
        started_seconds = time.perf_counter()
        tables, slot = self.tables, request.slot
        seen = [
            self._observe(request, group, num_tokens, last)
            for group in self._groups(request, layers)
        ]
        kept = [with_pinned(request, one, request.policy.retain(one)) for one in seen]
        # neighbours in the tables, so that their heads are the rows of one view
        heads = tables.of(slot, layers)
        scores, tiers = (join([getattr(one, name) for one in kept], 2) for name in TOKEN_FIELDS)
        budgets, is_static = (join([getattr(one, name) for one in kept], 1) for name in HEAD_FIELDS)
        keep = ops.select(scores, tiers, heads.lens, budgets)
        self._note_mass(request, layers, seen, keep)
        self._merge(request, layers, keep, seen, kept)
        ops.compact(keep, heads, tables.stack_of(slot), poison=self.poison)
        rows = slice(layers[0], layers[-1] + 1)
        is_static = is_static.view(len(layers), -1)
        tables.is_static[slot, rows] = is_static
        if request.quota.recall is not None:
            self._note_concentration(request, layers, seen)
        if last and self._makes_digests(request):
            ops.digest(heads)
            tables.is_retrieving[slot, rows] = ~is_static
        request.spend(time.perf_counter() - started_seconds)

    def _note_concentration(
        self, request: RequestState, layers: Sequence[int], seen: list[Observation]
    ) -> None:
        found = [one.concentration for one in seen if one.concentration is not None]
        if found:
            rows = slice(layers[0], layers[-1] + 1)
            noted = join(found, 1).view(len(layers), -1)
            self.tables.concentration[request.slot, rows] = noted

    def _note_mass(
        self,
        request: RequestState,
        layers: Sequence[int],
        seen: list[Observation],
        keep: torch.Tensor,
    ) -> None:
        """Multiply what each layer retained until now by what it keeps of what it holds."""
        found = [one.mass for one in seen if one.mass is not None]
        if request.retained_mass is None or not found:
            return
        mass = join(found, 2)
        of_layers = torch.stack((mass.sum(dim=-1), (mass * keep).sum(dim=-1)))
        whole, kept = of_layers.view(2, len(layers), -1).sum(dim=-1)
        rows = slice(layers[0], layers[-1] + 1)
        # a probe that attends to sinks alone may leave a head nothing to weigh
        request.retained_mass[rows] *= kept / whole.clamp(min=torch.finfo(mass.dtype).tiny)

    def forget(self, request: RequestState, layer: int, num_tokens: int) -> None:
        """Let a layer hold nothing of the tokens that were just appended to it, all that it holds.

        Args:
            request: postponed.
            layer: index of the layer.
            num_tokens: of the chunk.
        """
        heads = self.tables.of(request.slot, layer)
        keep = torch.zeros(heads.num_heads, num_tokens, dtype=torch.bool, device=heads.lens.device)
        ops.compact(keep, heads, self.tables.stack_of(request.slot), poison=self.poison)

    def share(self, request: RequestState) -> None:
        """Let a request's heads share its pages from its first compression on."""
        if not request.shared:
            self.tables.share(request.slot, request.blocks, request.held_tokens)
            request.share(self.new_layer_budgets(request.policy, request.quota))
            if self.notes_mass and asks_probe(request.policy):
                mass = torch.ones(self.tables.num_layers, device=self.tables.lens.device)
                request.watch_mass(mass)

    def compress_all(self, request: RequestState) -> None:
        """Compress all layers before a decode step, because the growth would pass the quota."""
        self.compress(request, range(self.tables.num_layers), 0, last=True)
        self.finished(request, last=True)

    def finished(self, request: RequestState, last: bool) -> None:
        """All layers of a request have been compressed; `last` as each was told."""
        request.compressed(has_digests=last and self._makes_digests(request))

    def _makes_digests(self, request: RequestState) -> bool:
        """Whether decode reads some pages of the request only, by their digests."""
        return reads_some_pages(request.policy, self.options)

    def _groups(self, request: RequestState, layers: Sequence[int]) -> list[Sequence[int]]:
        """Layers that the policy is asked about at once."""
        if request.policy.takes_layers and request.layer_budgets is None:
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
        mode = kept[0].merge
        if mode is None:
            return
        is_vision = join([observation.is_vision for observation in seen], 2)
        parts = zip(layers, keep.chunk(len(layers)), is_vision.chunk(len(layers)), strict=True)
        for layer, part, of_vision in parts:
            heads = self.tables.of(request.slot, layer)
            ops.merge(part, heads, of_vision, mode, seen[0].seen_tokens)

    def new_layer_budgets(self, policy: Policy, quota: Quota) -> LayerBudgets | None:
        """Running budgets of a new request under a policy; None if all layers are equal.

        Raises:
            ValueError: the policy does not fit the model.
        """
        sizes = (self.tables.num_layers, self.tables.num_heads, quota.budget_tokens)
        desired_tokens = policy.layer_budgets(*sizes)
        if desired_tokens is None:
            return None
        return LayerBudgets(desired_tokens, quota.budget_tokens, quota.max_chosen_tokens)

    def _observe(
        self, request: RequestState, layers: Sequence[int], num_tokens: int, last: bool
    ) -> Observation:
        """What the policy is told of one layer, or of several at once."""
        tables, policy, spans = self.tables, request.policy, request.spans
        seen_tokens = request.computed_tokens + num_tokens
        longest_tokens = request.longest_head_tokens(num_tokens)
        probes = self.probes.of(request, layers, seen_tokens)
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
        place = (request.slot, place_of(layers))
        return Observation(
            **measured,
            lens=tables.lens[place],
            is_vision=is_vision,
            span_ids=span_ids,
            seen_tokens=seen_tokens,
            protected_position=spans.trailing_frame_start(seen_tokens),
            budget_tokens=request.claim_tokens(layers[0], last=last),
            max_head_tokens=request.quota.max_chosen_tokens,
            was_static=tables.is_static[place] if request.has_classes else None,
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
        policy, heads = request.policy, self.tables.of(request.slot, layer)
        pool = heads.pool
        if probe is not None:
            found = self._score(policy, probe, heads, layer, longest_tokens)._asdict()
        else:
            found = {"positions": gather(pool.positions, heads, longest_tokens, -1)}
        if policy.needs_value_norms and probe is None:
            values = self._computed(VALUES, heads, layer, longest_tokens)
            norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            found["value_norms"] = norms
        if policy.needs_keys:
            found["keys"] = self._computed(KEYS, heads, layer, longest_tokens)
        if policy.needs_values:
            found["values"] = self._computed(VALUES, heads, layer, longest_tokens)
        # a policy that reads scores does without before the first probe
        if policy.needs_contrast and (probe is not None or not policy.needs_scores):
            found["contrast"] = ops.contrast(heads, longest_tokens)
        return found

    def _computed(
        self, part: int, heads: ops.PagedHeads, layer: int, longest_tokens: int
    ) -> torch.Tensor:
        """[H, n, D]: KEYS or VALUES that heads hold, as the model computed them, but for rounding.

        Zeros stand beyond the held tokens.
        """
        pool = heads.pool
        fields = (pool.keys, pool.values)[part]
        if layer not in self.units:
            return gather(fields, heads, longest_tokens, 0)
        # torch masks no 8-bit floats
        stored = gather(fields.view(torch.uint8), heads, longest_tokens, 0).view(fields.dtype)
        return stored.to(pool.layout.dtype) * self.units[layer][part]

    def _score(
        self,
        policy: Policy,
        probe: torch.Tensor,
        heads: ops.PagedHeads,
        layer: int,
        longest_tokens: int,
    ) -> ops.Scores:
        """Attention of a probe to what the layer holds."""
        return ops.score(
            probe,
            heads,
            self.scales[layer],
            self.options.top_k_tokens(longest_tokens),
            self.options.sink_tokens,
            policy.takes_largest,
            longest_tokens,
        )


def with_pinned(request: RequestState, observation: Observation, retention: Retention) -> Retention:
    """Let pinned tokens stay beside those that a policy chose; every head holds all of them.

    The policy was told of a budget without them, and is asked no more: what it chose of them makes
    room for others.
    """
    pinned = request.terms.pinned
    if not pinned.ranges:
        return retention
    positions = observation.positions
    is_pinned = torch.zeros_like(positions, dtype=torch.bool)
    for start, stop in pinned.ranges:
        is_pinned |= (positions >= start) & (positions < stop)
    num_pinned = pinned.count_before(observation.seen_tokens)
    return replace(
        retention,
        tiers=retention.tiers.masked_fill(is_pinned, Tier.PINNED),
        budgets=(retention.budgets + num_pinned).minimum(observation.lens),
    )


def gather(
    fields: torch.Tensor, heads: ops.PagedHeads, longest_tokens: int, fill: int
) -> torch.Tensor:
    """[H, n, ...]: a field [P, N, ...] of the pool of every token that one request's heads hold.

    `fill` stands beyond the held tokens, where the pool may hold NaN.
    """
    pages = heads.table[:, : ceil_div(longest_tokens, heads.page_tokens)]
    tokens = fields[pages.long()].flatten(1, 2)[:, :longest_tokens]
    index = torch.arange(longest_tokens, device=tokens.device)
    beyond = index >= heads.lens[:, None]
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
