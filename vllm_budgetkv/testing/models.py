"""Writes small models with random weights as ordinary Hugging Face folders; nothing is downloaded.

    path = build_qwen2_5_vl(cache)  # 2 layers, hidden 128, 2 KV heads
    path = build_qwen2_5_vl(cache, layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64)

A folder is named after its sizes and the code that wrote it, so a second call finds it. It holds
config.json, model.safetensors, the tokenizer with its chat template and, for Qwen2.5-VL, the
processors of images and video.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.testing import shapes, tokenizer, weights
from vllm_budgetkv.testing.shapes import DecoderShape, VisionShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, Qwen2_5_VLProcessor, Qwen2Tokenizer


def build_qwen2_5_vl(
    cache: Path, *, vision_depth: int = 2, vision_width: int = 64, **decoder: Any
) -> Path:
    """Writes a Qwen2.5-VL model for images and video; one token is 28 x 28 pixels of two frames.

    Args:
        cache: folder of models; the model gets a folder of its own inside.
        vision_depth: layers of the vision tower.
        vision_width: hidden size of the vision tower, a multiple of 32.
        decoder: fields of `DecoderShape`.

    Returns:
        The folder of the model.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    shape = DecoderShape(**decoder)
    vision = VisionShape(depth=vision_depth, width=vision_width)

    def write(folder: Path) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        config = qwen2_5_vl_config(shape, vision, vocabulary)
        _save_weights(Qwen2_5_VLForConditionalGeneration, config, shape, vocabulary, folder)
        build_processor(vocabulary).save_pretrained(folder)

    return cached(cache, shapes.fingerprint("qwen2_5_vl", shape, vision, source=source()), write)


def build_qwen2(cache: Path, **decoder: Any) -> Path:
    """Writes a text-only Qwen2 model; arguments, result and errors as for `build_qwen2_5_vl`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _build_text_model("qwen2", Qwen2Config, Qwen2ForCausalLM, cache, DecoderShape(**decoder))


def build_llama(cache: Path, **decoder: Any) -> Path:
    """Writes a text-only Llama model; arguments, result and errors as for `build_qwen2_5_vl`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build_text_model("llama", LlamaConfig, LlamaForCausalLM, cache, DecoderShape(**decoder))


def _build_text_model(
    kind: str, config_type: Any, model_type: Any, cache: Path, shape: DecoderShape
) -> Path:
    def write(folder: Path) -> None:
        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        config = config_type(**decoder_fields(shape, vocabulary), rope_parameters=rope)
        _save_weights(model_type, config, shape, vocabulary, folder)
        vocabulary.save_pretrained(folder)

    return cached(cache, shapes.fingerprint(kind, shape, source=source()), write)


def decoder_fields(shape: DecoderShape, vocabulary: Qwen2Tokenizer) -> dict[str, Any]:
    if shape.vocab_size < len(vocabulary):
        raise ValueError(
            f"vocab_size={shape.vocab_size} is below the {len(vocabulary)} tokens of the tokenizer"
        )
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_position_tokens,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }


def qwen2_5_vl_config(
    shape: DecoderShape, vision: VisionShape, vocabulary: Qwen2Tokenizer
) -> PreTrainedConfig:
    """Configuration of a Qwen2.5-VL of these sizes and this tokenizer."""
    from transformers import Qwen2_5_VLConfig

    rope = {
        "rope_type": "default",
        "rope_theta": shape.rope_theta,
        "mrope_section": shape.mrope_section,
    }
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.width,
        "intermediate_size": 2 * vision.width,
        "num_heads": vision.width // vision.head_dim,
        "patch_size": shapes.PATCH_PIXELS,
        "spatial_merge_size": shapes.SPATIAL_MERGE,
        "temporal_patch_size": shapes.FRAMES_PER_TOKEN,
        "out_hidden_size": shape.hidden,
        "fullatt_block_indexes": [vision.depth - 1],
    }
    name_to_id = vocabulary.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=decoder_fields(shape, vocabulary) | {"rope_parameters": rope},
        vision_config=tower,
        image_token_id=name_to_id("<|image_pad|>"),
        video_token_id=name_to_id("<|video_pad|>"),
        vision_start_token_id=name_to_id("<|vision_start|>"),
        vision_end_token_id=name_to_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def _save_weights(
    model_type: Any,
    config: PreTrainedConfig,
    shape: DecoderShape,
    vocabulary: Qwen2Tokenizer,
    folder: Path,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = model_type(config).float()
    weights.randomise(model, shape.seed, tokenizer.readable_tokens(vocabulary))
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)


def build_processor(vocabulary: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The processor of images and videos that belongs to these models."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    # from one cell up: small test frames are not enlarged
    pixels = {"shortest_edge": shapes.CELL_PIXELS**2, "longest_edge": 16384 * shapes.CELL_PIXELS**2}
    patches = {
        "patch_size": shapes.PATCH_PIXELS,
        "merge_size": shapes.SPATIAL_MERGE,
        "temporal_patch_size": shapes.FRAMES_PER_TOKEN,
    }
    images = Qwen2VLImageProcessor(size=pixels, **patches)
    videos = Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=True, **patches)
    return Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=vocabulary,
        video_processor=videos,
        chat_template=tokenizer.CHAT_TEMPLATE,
    )


def source() -> bytes:
    folder = Path(__file__).parent
    names = ("models.py", "shapes.py", "tokenizer.py", "weights.py")
    return b"".join((folder / name).read_bytes() for name in names)


def cached(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in `cache`, written where it is missing; never seen half-written."""
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
    try:
        write(draft)
        draft.replace(target)
    except OSError:
        # another process was first: its folder is the same one
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
