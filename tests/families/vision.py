"""Families that see, of whose processors Transformers has a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families import processors
from tests.families.family import Sight
from tests.families.text import LFM2
from vllm_budgetkv.testing.recurrent import STATE_FIELDS

if TYPE_CHECKING:
    from tests.families.family import Ids, Whole

WIDTH, HEADS, DEPTH = 64, 2, 2
MROPE = [8, 4, 4]
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
}
# of the kind of Qwen
QWEN_TOWER = {
    "depth": DEPTH,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_heads": HEADS,
}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def rope(text: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """`text` with more fields of its rotary embedding."""
    return text | {"rope_parameters": text["rope_parameters"] | fields}


def qwen_ids(ids: Ids) -> dict[str, Any]:
    """Ids of the tokens around pictures, by the names of Qwen's configurations."""
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def qwen2_vl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "mlp_ratio": 2}
    return {
        "text_config": rope(text, mrope_section=MROPE),
        "vision_config": tower | {"hidden_size": text["hidden_size"]},
        **qwen_ids(ids),
    }


def qwen3_vl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {
        **QWEN_TOWER,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": text["hidden_size"],
    }
    return {
        "text_config": rope(text, mrope_section=[6, 5, 5], mrope_interleaved=True),
        "vision_config": tower,
        **qwen_ids(ids),
    }


def qwen2_5_omni(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    hears = {
        "d_model": WIDTH,
        "encoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": WIDTH,
        "output_dim": text["hidden_size"],
    }
    tower = {**QWEN_TOWER, "fullatt_block_indexes": [1], "out_hidden_size": text["hidden_size"]}
    thinker = {
        "text_config": rope(text, mrope_section=MROPE),
        "vision_config": tower,
        "audio_config": hears,
        "image_token_index": ids("<|image_pad|>"),
        "video_token_index": ids("<|video_pad|>"),
        "audio_token_index": ids("<|AUDIO|>"),
        "audio_start_token_id": ids("<|audio_bos|>"),
        "audio_end_token_id": ids("<|audio_eos|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    return {"thinker_config": thinker, "enable_audio_output": False}


def glm4v(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {**QWEN_TOWER, "image_size": 112, "out_hidden_size": text["hidden_size"]}
    return {
        "text_config": rope(text, mrope_section=[2, 3, 3], partial_rotary_factor=0.5),
        "vision_config": tower,
        "image_token_id": ids("<|image|>"),
        "video_token_id": ids("<|video|>"),
        "image_start_token_id": ids("<|begin_of_image|>"),
        "image_end_token_id": ids("<|end_of_image|>"),
        "video_start_token_id": ids("<|begin_of_video|>"),
        "video_end_token_id": ids("<|end_of_video|>"),
        "tie_word_embeddings": False,
    }


def internvl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text | {"model_type": "qwen3"},
        "vision_config": TOWER | {"image_size": [112, 112]},
        "image_token_id": ids("<IMG_CONTEXT>"),
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


def mistral3(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text,
        "vision_config": TOWER | {"model_type": "pixtral", "image_size": 448, "patch_size": 14},
        "image_token_index": ids("[IMG]"),
        "tie_word_embeddings": False,
    }


def pixtral(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return mistral3(text | {"model_type": "mistral", "sliding_window": None}, ids) | {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def llava_onevision(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14}
    return {
        "text_config": text | {"model_type": "qwen2"},
        "vision_config": TOWER | tower | {"vision_use_head": False},
        "image_token_index": ids("<image>"),
        "video_token_index": ids("<video>"),
        "image_grid_pinpoints": processors.TILINGS,
        "tie_word_embeddings": False,
    }


def idefics3(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text | {"model_type": "llama"},
        "vision_config": TOWER | {"image_size": 112, "patch_size": 14},
        "image_token_id": ids("<image>"),
        "pad_token_id": text["pad_token_id"],
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }


def paddleocr_vl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": rope(text, mrope_section=MROPE),
        "vision_config": TOWER | {"image_size": 112, "patch_size": 14},
        **qwen_ids(ids),
    }


def lfm2_vl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text | LFM2 | {"model_type": "lfm2"},
        "vision_config": TOWER | {"model_type": "siglip2_vision_model", "patch_size": 16},
        "image_token_id": ids("<image>"),
        "tie_word_embeddings": False,
    }


def gemma3(picture_tokens: int) -> Whole:
    """Of Gemma 3, with pictures of 16 or 64 tokens, in front of which windows are longer."""
    tower = {"model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14}
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    windows = {
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "sliding_window": 2 * picture_tokens,
        "query_pre_attn_scalar": 32,
    }

    def whole(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
        return {
            "text_config": text | windows,
            "vision_config": TOWER | tower,
            "mm_tokens_per_image": picture_tokens,
            "boi_token_index": ids("<start_of_image>"),
            "eoi_token_index": ids("<end_of_image>"),
            "image_token_index": ids("<image_soft_token>"),
            "tie_word_embeddings": False,
        }

    return whole


def paligemma(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {"model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14}
    return {
        "text_config": {"model_type": "gemma", **text},
        "vision_config": TOWER | tower | {"projection_dim": text["hidden_size"]},
        "projection_dim": text["hidden_size"],
        "image_token_index": ids("<image>"),
        "vocab_size": text["vocab_size"],
        "tie_word_embeddings": True,
    }


def bagel(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    tower = {"image_size": 112, "patch_size": 14, "vision_use_head": False}
    return {
        "llm_config": text,
        "vit_config": TOWER | tower,
        "vit_max_num_patch_per_side": 8,
        "tie_word_embeddings": False,
    }


def moondream3(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    """Of Moondream 3, whose pictures have 729 tokens whatever is asked for."""
    language = {
        "dim": text["hidden_size"],
        "ff_dim": text["intermediate_size"],
        "n_layers": DEPTH,
        "vocab_size": text["vocab_size"],
        "max_context": text["max_position_embeddings"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_attention_heads"],
        "moe": {"start_layer": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_inner_dim": 64},
    }
    tower = {
        "enc_dim": WIDTH,
        # as many as patches in a row: vLLM's class takes the one for the other
        "enc_n_layers": 27,
        "enc_ff_dim": 2 * WIDTH,
        "enc_n_heads": HEADS,
        "proj_inner_dim": 2 * WIDTH,
    }
    return {"config": {"text": language, "vision": tower}}


def minicpmv4_6(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    fields = {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        **STATE_FIELDS,
    }
    return {
        "text_config": text | fields,
        "vision_config": TOWER | {"patch_size": 14, "insert_layer_id": 0},
        "insert_layer_id": 0,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "tie_word_embeddings": False,
    }


def kimi_vl(text: dict[str, Any], ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text,
        "vision_config": TOWER,
        "media_placeholder_token_id": ids("<|image_pad|>"),
    }


def qwen_sight(whole: Any, processor: Any, **fields: Any) -> Sight:
    """A sight that is asked as Qwen's are."""
    return Sight(whole=whole, processor=processor, picture=QWEN_PICTURE, video=QWEN_VIDEO, **fields)
