"""What an index knows of keys: few bits of few channels, of a token or of neighbours at once.

The engine's own index (`vllm_budgetkv/ops/reference/encode.py`) is one of these; here are those
that it was chosen from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE_ENTRIES = 256
# steps of the best uniform quantisers of a Gaussian, in deviations, by bits (Max, 1960)
STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352}


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is kept of a key.

    Args:
        bits: of a channel that is coded.
        share: of the channels that are coded; the others are at their mean.
        asks: whether these are the ones with most energy in the question's queries times variance,
            instead of variance alone.
        candidates: tokens that the sketch finds for each that is taken by its exact key.
        tokens: neighbours that share what is kept, the mean of their keys.
    """

    bits: int
    share: float = 1.0
    asks: bool = True
    candidates: int = 1
    tokens: int = 1

    @property
    def channel_bits(self) -> float:
        """Bits of a channel of a key."""
        return self.bits * self.share / self.tokens

    def title(self) -> str:
        channels = "all channels" if self.share == 1 else f"{self.share:g} of the channels"
        how = "" if self.share == 1 else ", by energy" if self.asks else ", by variance"
        shared = f", {self.tokens} tokens at once" if self.tokens > 1 else ""
        exact = f", best of {self.candidates} by exact keys" if self.candidates > 1 else ""
        return f"{self.bits} bits, {channels}{how}{shared}{exact}"

    def of(self, keys: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        """The keys [n, D] as the sketch says them."""
        groups = keys.split(self.tokens)
        said = self._code(torch.stack([group.mean(dim=0) for group in groups]), energy)
        return said.repeat_interleave(self.tokens, dim=0)[: len(keys)]

    def _code(self, keys: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        step, levels = STEPS[self.bits], 2**self.bits
        known = torch.empty_like(keys)
        for first in range(0, len(keys), PAGE_ENTRIES):
            part = keys[first : first + PAGE_ENTRIES]
            variance, mean = torch.var_mean(part, dim=0, correction=0)
            weight = variance * energy if self.asks else variance
            channels = weight.topk(round(self.share * keys.shape[1])).indices
            width = (step * variance[channels].sqrt()).clamp(min=1e-12)
            code = ((part[:, channels] - mean[channels]) / width + levels / 2).floor()
            code = code.clamp(0, levels - 1)
            said = mean.expand_as(part).clone()
            said[:, channels] = mean[channels] + width * (code - (levels - 1) / 2)
            known[first : first + PAGE_ENTRIES] = said
        return known
