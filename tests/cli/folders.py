"""Folders of models with a configuration and a processor, and without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.testing.models import build_processor, qwen2_5_vl_config
from vllm_budgetkv.testing.shapes import DecoderShape, VisionShape
from vllm_budgetkv.testing.tokenizer import CHAT_TEMPLATE, build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Qwen2Tokenizer, Qwen3VLProcessor

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


def write_qwen3_vl_8b(folder: Path) -> Path:
    """The sizes of Qwen3-VL-8B, whose encoder hands features of three of its layers on too."""
    from transformers import Qwen3VLConfig

    vocabulary = build_tokenizer(262144)
    name_to_id = vocabulary.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        image_token_id=name_to_id("<|image_pad|>"),
        video_token_id=name_to_id("<|video_pad|>"),
        vision_start_token_id=name_to_id("<|vision_start|>"),
        vision_end_token_id=name_to_id("<|vision_end|>"),
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    _qwen3_vl_processor(vocabulary).save_pretrained(folder)
    return folder


def _qwen3_vl_processor(vocabulary: Qwen2Tokenizer) -> Qwen3VLProcessor:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 65536, "longest_edge": 16777216}
    video_pixels = {"shortest_edge": 4096, "longest_edge": 25165824}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **patches),
        tokenizer=vocabulary,
        video_processor=Qwen3VLVideoProcessor(size=video_pixels, **patches),
        chat_template=CHAT_TEMPLATE,
    )
