"""Sizes of the generated test models, validated before anything is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """A decoder-only language model; the default is about the smallest that stock vLLM runs."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 256
    vocab_size: int = 512
    max_position_tokens: int = 131072
    rope_theta: float = 1e4
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; "
                "each KV head must serve the same number of query heads"
            )
        if self.hidden != self.heads * self.head_dim:
            raise ValueError(
                f"hidden={self.hidden} must equal heads x head_dim = {self.heads} x "
                f"{self.head_dim} = {self.heads * self.head_dim}"
            )
        if self.head_dim % 8:
            raise ValueError(
                f"head_dim={self.head_dim} must be a multiple of 8 to split its M-RoPE"
            )

    @property
    def mrope_section(self) -> list[int]:
        """Rotation pairs for time, height and width: a half and two quarters of `head_dim / 2`."""
        spatial = self.head_dim // 8
        return [self.head_dim // 2 - 2 * spatial, spatial, spatial]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """A Qwen2.5-VL vision tower; `CELL_PIXELS` squared pixels and two frames become one token."""

    depth: int = 2
    width: int = 64
    head_dim: int = 32

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise ValueError(
                f"vision width={self.width} must be a multiple of its head size {self.head_dim}"
            )


PATCH_PIXELS = 14
SPATIAL_MERGE = 2
FRAMES_PER_TOKEN = 2
CELL_PIXELS = PATCH_PIXELS * SPATIAL_MERGE


def fingerprint(kind: str, *parts: DecoderShape | VisionShape, source: bytes) -> str:
    """A name for the folder of a model: `kind`, and a hash of its sizes and of what writes it."""
    sizes = json.dumps([asdict(part) for part in parts], sort_keys=True).encode()
    return f"{kind}-{hashlib.sha256(sizes + source).hexdigest()[:12]}"
