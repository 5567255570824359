"""The cache of transformers, counted, and one step of its decode; in kvpress' environment."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class CountingCache(DynamicCache):
    """Knows the most bytes of keys and values that it held at once.

    A layer's entry is counted when it has been added, before a press shortens it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        found = super().update(*args, **kwargs)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes())
        return found

    def held_bytes(self) -> int:
        full = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in full)


def load(folder: str) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_bytes(model: Any) -> int:
    """Keys and values of one token over all layers, float32."""
    config = model.config
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    return vectors * config.head_dim * torch.float32.itemsize


def decode(model: Any, token: int, position: int, cache: DynamicCache) -> torch.Tensor:
    """Logits [vocabulary] behind one more token."""
    out = model(
        input_ids=torch.tensor([[token]]),
        past_key_values=cache,
        position_ids=torch.tensor([[position]]),
    )
    return out.logits[0, -1]
