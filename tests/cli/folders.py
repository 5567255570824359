"""Folders of models with a configuration and a processor, and without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.testing.models import build_processor, qwen2_5_vl_config
from vllm_budgetkv.testing.shapes import DecoderShape, VisionShape
from vllm_budgetkv.testing.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SEVEN_B = DecoderShape(
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab_size=152064,
    max_position_tokens=128000,
    rope_theta=1e6,
    dtype="bfloat16",
)


def write_qwen2_5_vl_7b(folder: Path, *, has_processor: bool = True) -> Path:
    """The sizes of Qwen2.5-VL-7B; tokenizer and processor are those of the test models."""
    vocabulary = build_tokenizer(SEVEN_B.max_position_tokens)
    config = qwen2_5_vl_config(SEVEN_B, VisionShape(depth=32, width=1280, head_dim=80), vocabulary)
    config.vision_config.intermediate_size = 3420
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.dtype = SEVEN_B.dtype
    config.save_pretrained(folder)
    if has_processor:
        build_processor(vocabulary).save_pretrained(folder)
    return folder
