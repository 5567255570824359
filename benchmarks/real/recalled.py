"""What a step may read when tokens that were dropped can come back: `Readable`s for `ToldModel`.

A head that recalls ranks all dropped tokens by its own current query, with exact keys or with
codes of few bits (HybridKV, https://arxiv.org/abs/2604.05887, fetches chunks of dynamic heads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from benchmarks.real.sketch import Sketch
    from benchmarks.real.told import Memory

Pick = Literal["sharp", "broad", "random"]
# a Gaussian's best levels in units of its deviation (Lloyd and Max): borders between the levels
# follow from them
LEVELS = {1: (-0.798, 0.798), 2: (-1.510, -0.453, 0.453, 1.510)}
CODED_TOKENS = 256
SEED = 20261126


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Which heads look tokens up, and how.

    Args:
        back: dropped tokens that a head reads in a step (C), as a share of the budget.
        own: what a head that recalls keeps besides, likewise; the others keep what is left.
        heads_share: of all heads of the model that recall.
        pick: which of them: those whose question attends to few tokens, to many, or any.
        bits: per channel of a key; None ranks by exact keys.
        sketch: what the codes say of a key, instead of `bits`.
    """

    back: float = 0.5
    own: float = 0.5
    heads_share: float = 1.0
    pick: Pick = "sharp"
    bits: int | None = None
    sketch: Sketch | None = None

    def index_tokens(self, num_tokens: int) -> float:
        """What the codes take, per head and on average, in tokens of bfloat16 K and V.

        A token of D channels has 4 D bytes, its code `bits` D / 8.
        """
        bits = self.bits or 0 if self.sketch is None else self.sketch.channel_bits
        return self.heads_share * num_tokens * bits / 32

    def heads(self, concentration: torch.Tensor) -> torch.Tensor:
        """bool [L, H], those that recall, ranked by `concentration` [L, H] over the whole model."""
        count = round(self.heads_share * concentration.numel())
        noise = torch.rand(concentration.shape, generator=torch.Generator().manual_seed(SEED))
        rank = {"sharp": concentration, "broad": -concentration, "random": noise}[self.pick]
        chosen = torch.zeros(concentration.numel(), dtype=torch.bool)
        chosen[rank.flatten().argsort(descending=True, stable=True)[:count]] = True
        return chosen.view_as(concentration)

    def split(self, budget_tokens: float) -> tuple[int, int, int]:
        """(recalled, own, of a head that does not recall), which come to the budget on average."""
        theirs = self.heads_share * (self.back + self.own)
        rest = (1.0 - theirs) / (1.0 - self.heads_share) if self.heads_share < 1 else 0.0
        back, own, others = (int(part * budget_tokens) for part in (self.back, self.own, rest))
        return back, own, others


def code(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys [H, n, D] as their codes say them.

    Mean and deviation of each channel are those of the first tokens, so that a code never changes.
    """
    first = keys[:, :CODED_TOKENS]
    mean, deviation = first.mean(dim=1, keepdim=True), first.std(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS[bits])
    borders = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize((keys - mean) / deviation.clamp(min=1e-6), borders)
    return mean + deviation * levels[index]


@dataclass(frozen=True)
class Reader:
    """Resident tokens, and those that a head's query finds among the others.

    Args:
        kept: bool [L, H, n], resident.
        memory: of the prompt.
        recall: how; None reads what is resident.
        back_tokens: that are recalled in a step.
        heads: bool [L, H], those that recall.
        energy: float32 [L, H, D], mean square of the question's queries, for sketches.
    """

    kept: torch.Tensor
    memory: Memory
    recall: Recall | None = None
    back_tokens: int = 0
    heads: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    _codes: dict[int, torch.Tensor] = field(default_factory=dict, init=False)

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """See `Readable`."""
        kept = self.kept[layer, :, None, : keys.shape[1]].expand(-1, queries.shape[1], -1)
        if self.recall is None:
            return kept
        assert self.heads is not None
        found = self.find(layer, queries, keys, kept) & self.heads[layer, :, None, None]
        return kept | found

    def find(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """bool [H, a, n]: the best that are not kept, by the group's summed probabilities."""
        assert self.recall is not None
        known = self._known(layer)[:, : keys.shape[1]]
        mass = _mass(queries, known).masked_fill(kept, -1.0)
        candidates = 1 if self.recall.sketch is None else self.recall.sketch.candidates
        best = mass.topk(min(candidates * self.back_tokens, mass.shape[-1]), dim=-1).indices
        if candidates > 1:
            exact = _mass(queries, keys).masked_fill(kept, -1.0).gather(-1, best)
            best = best.gather(-1, exact.topk(min(self.back_tokens, exact.shape[-1])).indices)
        return torch.zeros_like(kept).scatter_(-1, best, value=True)

    def _known(self, layer: int) -> torch.Tensor:
        """Keys [H, n, D] of a layer as the index says them."""
        assert self.recall is not None
        keys = self.memory.keys[layer]
        if layer in self._codes:
            return self._codes[layer]
        if self.recall.sketch is not None:
            assert self.energy is not None
            pairs = zip(keys, self.energy[layer], strict=True)
            keys = torch.stack([self.recall.sketch.of(*pair) for pair in pairs])
        elif self.recall.bits is not None:
            keys = code(keys, self.recall.bits)
        self._codes[layer] = keys
        return keys


def _mass(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float32 [H, a, n]: attention of queries [H * G, a, D], summed over the group."""
    grouped = queries.unflatten(0, (keys.shape[0], -1))
    logits = torch.einsum("hgad,hnd->hgan", grouped, keys) * keys.shape[-1] ** -0.5
    return logits.softmax(dim=-1).sum(dim=1)
