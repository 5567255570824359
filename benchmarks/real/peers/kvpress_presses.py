"""Presses of kvpress that share one prefill; in kvpress' environment.

What is kept is chosen by kvpress' own code, with its own settings. Here it is only called for many
presses and shares in one pass over the prompt, since the pass is what costs time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KVzipPress,
    SnapKVPress,
)
from kvpress.presses.base_press import BasePress

if TYPE_CHECKING:
    import torch

PRESSES = {
    "snapkv": SnapKVPress,
    "keydiff": KeyDiffPress,
    "expected": ExpectedAttentionPress,
    # what kvpress' leaderboard calls Expected Attention
    "adakv-expected": lambda: AdaKVPress(ExpectedAttentionPress(epsilon=1e-2)),
}


@dataclass(frozen=True)
class Layer:
    """What a press leaves of one layer.

    Attributes:
        keys, values: float32 [1, H, n, D].
        masked: (batch, head, token) indices that may not be attended to; None where the press
            took tokens out. A press for single heads masks and frees nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    masked: tuple[torch.Tensor, ...] | None

    def kept_tokens(self) -> float:
        """Mean over the heads."""
        num_masked = 0 if self.masked is None else len(self.masked[0])
        return self.keys.shape[2] - num_masked / self.keys.shape[1]


@dataclass
class Several(BasePress):
    """Compresses every layer by each press, and leaves the cache of the prefill whole.

    Args:
        presses: by name and share.
        layers: filled here, layer by layer.
    """

    presses: dict[tuple[str, float], Any]
    layers: dict[tuple[str, float], list[Layer]] = field(default_factory=dict)

    def post_init_from_model(self, model: Any) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
        for name, press in self.presses.items():
            module.masked_key_indices = None
            kept = press.compress(module, hidden_states, keys, values, *rest)
            self.layers.setdefault(name, []).append(Layer(*kept, module.masked_key_indices))
        module.masked_key_indices = None
        return keys, values


class KVzipShares(KVzipPress):
    """KVzip, which scores once and then chooses for each share.

    Attributes:
        masks: by share and layer, filled when the context of the press ends.
    """

    def choose(self, shares: list[float]) -> KVzipShares:
        self.shares, self.masks = shares, {share: [] for share in shares}
        self.compression_ratio = 1 - min(shares)
        return self

    def compress_post(self, model: Any) -> None:
        for share in self.shares:
            self.compression_ratio = 1 - share
            super().compress_post(model)
            for layer in model.model.layers:
                self.masks[share].append(layer.self_attn.masked_key_indices)
                layer.self_attn.masked_key_indices = None


def several(names: list[str], shares: list[float]) -> Several:
    """Presses by name, each at each share."""
    presses = {}
    for name in names:
        for share in shares:
            presses[name, share] = PRESSES[name]()
            presses[name, share].compression_ratio = 1 - share
    return Several(presses)
