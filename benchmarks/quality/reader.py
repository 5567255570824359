"""The small model of the lab: a Qwen2.5-VL that reads letters and digits, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.testing import shapes, tokenizer
from vllm_budgetkv.testing.models import qwen2_5_vl_config

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
    )

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

# of untrained weights: about 1 / sqrt(hidden), since attention that starts flat finds nothing for
# long; of the embeddings, so that what the layers add does not drown which token stands there
INITIAL_DEVIATION = 0.08
EMBEDDING_DEVIATION = 0.5

# how many tokens back each of these heads of the first layer looks at the start: to look up what
# stands behind a token is to find the one before, and nothing finds that by chance for long
LOOK_BACK_TOKENS = {0: 1, 1: 2, 2: 3}
LOOK_BACK_PAIRS = 6  # of the rotation, the fastest, all of the time axis
LOOK_BACK_BIAS = 5.0
LOOK_BACK_SHRINK = 0.3

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
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = INITIAL_DEVIATION
    return config


def build_untrained(vocabulary: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights, float32; what layers add is scaled down as in GPT-2."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(build_config(vocabulary)).float()
    language = model.model.language_model
    with torch.no_grad():
        language.embed_tokens.weight.normal_(0.0, EMBEDDING_DEVIATION)
        for layer in language.layers:
            layer.self_attn.o_proj.weight.mul_((2 * SHAPE.layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * SHAPE.layers) ** -0.5)
        look_back(language.layers[0].self_attn)
    return model


def look_back(attention: torch.nn.Module) -> None:
    """Makes heads attend mostly to the token `LOOK_BACK_TOKENS` before. Mutates `attention`.

    Constant queries and keys, turned by the rotary embedding, score the distance alone: the sum of
    `cos(frequency * (distance - wanted distance))` over the rotation pairs. In a video the distance
    is one in frames.
    """
    queries = attention.q_proj.weight.view(SHAPE.heads, SHAPE.head_dim, -1)
    keys = attention.k_proj.weight.view(SHAPE.kv_heads, SHAPE.head_dim, -1)
    query_bias = attention.q_proj.bias.view(SHAPE.heads, 2, -1)
    key_bias = attention.k_proj.bias.view(SHAPE.kv_heads, 2, -1)
    heads = list(LOOK_BACK_TOKENS)
    own_keys = sorted({head * SHAPE.kv_heads // SHAPE.heads for head in heads})
    queries[heads] *= LOOK_BACK_SHRINK
    keys[own_keys] *= LOOK_BACK_SHRINK
    key_bias[own_keys, 0, :LOOK_BACK_PAIRS] = LOOK_BACK_BIAS
    frequency = SHAPE.rope_theta ** (-torch.arange(LOOK_BACK_PAIRS) * 2 / SHAPE.head_dim)
    for head, distance_tokens in LOOK_BACK_TOKENS.items():
        angle = distance_tokens * frequency
        query_bias[head, :, :LOOK_BACK_PAIRS] = LOOK_BACK_BIAS * torch.stack(
            [angle.cos(), -angle.sin()]
        )
