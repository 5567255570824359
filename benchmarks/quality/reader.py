"""The small model of the lab: a Qwen2.5-VL that reads letters and digits, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_budgetkv.testing import shapes, tokenizer
from vllm_budgetkv.testing.models import qwen2_5_vl_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, Qwen2Tokenizer

FOLDER = Path(__file__).parent / "model"

SHAPE = shapes.DecoderShape(
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=384,
    vocab_size=512,
    rope_theta=1e4,
    dtype="bfloat16",
)
VISION = shapes.VisionShape(depth=2, width=64)

# the words of the template and of the tasks, often enough to become one token each; letters and
# digits stay tokens of their own
WORDS = (
    "system",
    "user",
    "assistant",
    "You are a helpful assistant.",
    "read",
    "page",
    "note",
    "? first",
    "? last",
    "? count",
    "? change",
    "? next",
)
CORPUS = "\n".join(WORDS * 8)
VOCABULARY = 384


def build_vocabulary() -> Qwen2Tokenizer:
    """The tokenizer: letters and digits are single tokens, the words of the tasks too."""
    return tokenizer.build_tokenizer(SHAPE.max_position_tokens, CORPUS, VOCABULARY)


def build_config(vocabulary: Qwen2Tokenizer) -> PreTrainedConfig:
    """Untrained configuration; a token of video is one position, whatever its frame rate of 2."""
    config = qwen2_5_vl_config(SHAPE, VISION, vocabulary)
    config.vision_config.tokens_per_second = 1
    return config
