"""Small models whose layers are three of recurrent state to one of attention, as `models` writes.

    path = build_qwen3_next(cache)  # 8 layers, 2 of them with attention
    path = build_qwen3_5(cache, layers=4)

vLLM's kernels for CPUs serve them in bfloat16 and with state of 128 x 128 elements per head only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.testing import models, shapes, tokenizer, weights
from vllm_budgetkv.testing.shapes import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Tokenizer, Qwen3VLProcessor

STATE_HEAD_DIM = 128
STATE_FIELDS = {
    "linear_key_head_dim": STATE_HEAD_DIM,
    "linear_value_head_dim": STATE_HEAD_DIM,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
}
# logarithm of the rate at which state forgets: it remembers some 30 tokens
DECAY = -3.0
# the vision tower of the models for images
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "patch_size": 16,
}
# of its RMSNorms, that of queries and of keys; they are centred on zero, so that 0 is a factor of 1
QUERY_NORM, KEY_NORM = 0.6, 0.2


def build_qwen3_next(cache: Path, **decoder: Any) -> Path:
    """Writes a text-only Qwen3-Next.

    Args:
        cache: folder of models; the model gets a folder of its own inside.
        decoder: fields of `DecoderShape`.

    Returns:
        The folder of the model.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return _build("qwen3_next", Qwen3NextConfig, Qwen3NextForCausalLM, cache, decoder)


def build_qwen3_5(cache: Path, **decoder: Any) -> Path:
    """Writes a text-only Qwen3.5; arguments and result as for `build_qwen3_next`."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return _build("qwen3_5", Qwen3_5TextConfig, Qwen3_5ForCausalLM, cache, decoder)


def build_qwen3_5_vl(cache: Path, **decoder: Any) -> Path:
    """Writes a Qwen3.5 for images; one token is 32 x 32 pixels. As for `build_qwen3_next`."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    def config_of(text: dict[str, Any], vocabulary: Qwen2Tokenizer) -> PreTrainedConfig:
        name_to_id = vocabulary.convert_tokens_to_ids
        text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return Qwen3_5Config(
            text_config=text,
            vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
            image_token_id=name_to_id("<|image_pad|>"),
            video_token_id=name_to_id("<|video_pad|>"),
            vision_start_token_id=name_to_id("<|vision_start|>"),
            vision_end_token_id=name_to_id("<|vision_end|>"),
            tie_word_embeddings=False,
        )

    kind = "qwen3_5_vl"
    return _build(kind, config_of, Qwen3_5ForConditionalGeneration, cache, decoder)


def build_processor(vocabulary: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """The processor of images and videos of Qwen3-VL and Qwen3.5; one token is 32 x 32 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    cell_pixels = 32 * 32
    pixels = {"shortest_edge": cell_pixels, "longest_edge": 4096 * cell_pixels}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **sizes),
        tokenizer=vocabulary,
        video_processor=Qwen3VLVideoProcessor(size=pixels, **sizes),
        chat_template=tokenizer.CHAT_TEMPLATE,
    )


def _build(
    kind: str, config_type: Any, model_type: Any, cache: Path, decoder: dict[str, Any]
) -> Path:
    shape = DecoderShape(**{"layers": 8, "dtype": "bfloat16", **decoder})

    def write(folder: Path) -> None:
        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        text = _text_fields(shape, vocabulary)
        if kind.endswith("_vl"):
            config = config_type(text, vocabulary)
        else:
            config = config_type(**text)
        model = model_type(config).float()
        weights.randomise(model, shape.seed, tokenizer.readable_tokens(vocabulary))
        _set_norms(model)
        model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
        kept = build_processor(vocabulary) if kind.endswith("_vl") else vocabulary
        kept.save_pretrained(folder)

    source = models.source() + Path(__file__).read_bytes()
    return models.cached(cache, shapes.fingerprint(kind, shape, source=source), write)


def _text_fields(shape: DecoderShape, vocabulary: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        **models.decoder_fields(shape, vocabulary),
        "head_dim": shape.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": 0.25,
        },
        **STATE_FIELDS,
        # of Qwen3-Next one layer at least has experts
        "mlp_only_layers": list(range(shape.layers - 1)),
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }


def _set_norms(model: PreTrainedModel) -> None:
    """Undo what `randomise` does to norms that are centred on zero, and to the rates of decay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(DECAY)
            elif (
                name.endswith("norm.weight") and "linear_attn" not in name and "visual" not in name
            ):
                is_query, is_key = name.endswith("q_norm.weight"), name.endswith("k_norm.weight")
                parameter.fill_(QUERY_NORM if is_query else KEY_NORM if is_key else 0.0)
