"""A small Qwen3-VL, which hands features of two layers of its tower on, as `models` writes.

path = build_qwen3_vl(cache)  # 2 layers, one token is 32 x 32 pixels of two frames
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.testing import models, recurrent, shapes, tokenizer, weights
from vllm_budgetkv.testing.shapes import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, Qwen2Tokenizer


def build_qwen3_vl(cache: Path, **decoder: Any) -> Path:
    """Writes a Qwen3-VL for images and videos, with the times of frames between them.

    Args:
        cache: folder of models; the model gets a folder of its own inside.
        decoder: fields of `DecoderShape`.

    Returns:
        The folder of the model.
    """
    shape = DecoderShape(**decoder)

    def write(folder: Path) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        model = Qwen3VLForConditionalGeneration(_config(shape, vocabulary)).float()
        weights.randomise(model, shape.seed, tokenizer.readable_tokens(vocabulary))
        model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
        recurrent.build_processor(vocabulary).save_pretrained(folder)

    source = models.source() + Path(__file__).read_bytes() + Path(recurrent.__file__).read_bytes()
    return models.cached(cache, shapes.fingerprint("qwen3_vl", shape, source=source), write)


def _config(shape: DecoderShape, vocabulary: Qwen2Tokenizer) -> PreTrainedConfig:
    from transformers import Qwen3VLConfig

    rope = {
        "rope_type": "default",
        "rope_theta": shape.rope_theta,
        "mrope_section": shape.mrope_section,
        "mrope_interleaved": True,
    }
    text = models.decoder_fields(shape, vocabulary)
    text |= {"head_dim": shape.head_dim, "rope_parameters": rope}
    name_to_id = vocabulary.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config=text,
        vision_config={
            **recurrent.TOWER,
            "out_hidden_size": shape.hidden,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=name_to_id("<|image_pad|>"),
        video_token_id=name_to_id("<|video_pad|>"),
        vision_start_token_id=name_to_id("<|vision_start|>"),
        vision_end_token_id=name_to_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
