"""Decoders of the models whose shapes are timed, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_TOKENS = 1024
PROBE_TOKENS = 32
RETRIEVAL_RATIO = 0.4


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped queries and a gated MLP."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128

    @property
    def group(self) -> int:
        """Query heads of a KV head (G)."""
        return self.heads // self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's matrix products: Q, K, V, output, and the three of the MLP."""
        projections = 2 * (self.heads + self.kv_heads) * self.head_size * self.hidden
        return projections + 3 * self.hidden * self.intermediate

    def forward_flops(self, new_tokens: int, keys: float) -> float:
        """Operations of all layers for `new_tokens` that see `keys` keys each, on average."""
        attention = 4 * self.heads * self.head_size * keys
        return self.layers * new_tokens * (2.0 * self.layer_weights + attention)


QWEN25_VL_3B = ModelShape("Qwen2.5-VL-3B", 36, 2048, 11008, 16, 2)
QWEN25_VL_7B = ModelShape("Qwen2.5-VL-7B", 28, 3584, 18944, 28, 4)
QWEN25_VL_32B = ModelShape("Qwen2.5-VL-32B", 64, 5120, 27648, 40, 8)
QWEN25_VL_72B = ModelShape("Qwen2.5-VL-72B", 80, 8192, 29568, 64, 8)
QWEN3_VL_8B = ModelShape("Qwen3-VL-8B", 36, 4096, 12288, 32, 8)
MODELS = (QWEN25_VL_3B, QWEN25_VL_7B, QWEN25_VL_32B, QWEN25_VL_72B, QWEN3_VL_8B)
