"""Rows of families that see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families import processors, vision
from tests.families.family import Family, Sight
from tests.families.text import MINISTRAL3, MLA
from tests.families.vision import EXPERTS, QWEN_PICTURE, qwen_sight
from vllm_budgetkv.testing import models, recurrent

if TYPE_CHECKING:
    from tests.families.family import Whole

GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
OMNI_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
MISTRAL_TOKENS = {"image": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"}
GLM_SIGHT: dict[str, Any] = {
    "processor": processors.glm4v,
    "picture": "<|begin_of_image|><|image|><|end_of_image|>",
    "video": "<|begin_of_video|><|video|><|end_of_video|>",
    "tokens": GLM_TOKENS,
}


def mistral_sight(whole: Whole, merge: int) -> Sight:
    """A sight of the kind of Pixtral, whose pictures have as many tokens whatever is merged."""
    return Sight(
        whole=whole,
        processor=processors.pixtral(merge),
        picture="[IMG]",
        tokens=MISTRAL_TOKENS,
        pixels=56 * merge,
        large_pixels=112 * merge,
    )


def gemma3_sight(picture_tokens: int) -> Sight:
    """A sight whose pictures have as many tokens whatever their size."""
    return Sight(
        whole=vision.gemma3(picture_tokens),
        processor=processors.gemma3(picture_tokens),
        picture="<start_of_image>",
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            # vLLM's processor looks for them, beside pictures in lines of their own
            **{f"lines_{count}": "\n" * count for count in range(1, 5)},
        },
    )


# one picture, in front of the text
PALIGEMMA_SIGHT = Sight(
    whole=vision.paligemma,
    processor=processors.paligemma,
    picture="",
    tokens={"image_token": "<image>", "line": "\n"},
    large_pictures=1,
    most_pictures=1,
)
SEEING = [
    Family(
        name="Qwen2-VL",
        architecture="Qwen2VLForConditionalGeneration",
        config="Qwen2VLConfig",
        sight=qwen_sight(vision.qwen2_vl, processors.qwen2_vl),
        special="biases",
    ),
    Family(
        name="Qwen2.5-VL",
        architecture="Qwen2_5_VLForConditionalGeneration",
        folder=models.build_qwen2_5_vl,
        sight=qwen_sight(None, None),
        special="biases",
    ),
    Family(
        name="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        config="Qwen3VLConfig",
        sight=qwen_sight(vision.qwen3_vl, processors.qwen3_vl),
        special="deepstack, norms of heads",
        modes=("v2", "compiled"),
    ),
    Family(
        name="Qwen3-VL MoE",
        architecture="Qwen3VLMoeForConditionalGeneration",
        config="Qwen3VLMoeConfig",
        fields={**EXPERTS, "norm_topk_prob": True},
        sight=qwen_sight(vision.qwen3_vl, processors.qwen3_vl),
        special="deepstack, norms of heads, experts",
    ),
    Family(
        name="Qwen2.5-Omni, thinker",
        architecture="Qwen2_5OmniModel",
        config="Qwen2_5OmniConfig",
        sight=qwen_sight(vision.qwen2_5_omni, processors.qwen2_5_omni, tokens=OMNI_TOKENS),
        special="biases",
    ),
    Family(
        name="Qwen3.5, pictures",
        architecture="Qwen3_5ForConditionalGeneration",
        folder=recurrent.build_qwen3_5_vl,
        sight=qwen_sight(None, None),
        dtype="bfloat16",
        special="gated delta rule, gated attention",
        page_quota=1,
    ),
    Family(
        name="GLM-4.1V",
        architecture="Glm4vForConditionalGeneration",
        config="Glm4vConfig",
        sight=Sight(whole=vision.glm4v, **GLM_SIGHT),
        special="norms behind layers, joined projections",
    ),
    Family(
        name="GLM-4.5V",
        architecture="Glm4vMoeForConditionalGeneration",
        config="Glm4vMoeConfig",
        fields={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "use_qk_norm": False,
            "n_group": 1,
            "topk_group": 1,
        },
        sight=Sight(whole=vision.glm4v, **GLM_SIGHT),
        special="experts",
    ),
    Family(
        name="InternVL 3.5",
        architecture="InternVLForConditionalGeneration",
        config="InternVLConfig",
        sight=Sight(
            whole=vision.internvl,
            processor=processors.internvl,
            picture="<IMG_CONTEXT>\n",
            video="<video>\n",
            tokens={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        ),
        special="norms of heads",
    ),
    Family(
        name="Mistral Small 3, Medium 3",
        architecture="Mistral3ForConditionalGeneration",
        config="Mistral3Config",
        fields={"model_type": "mistral", "sliding_window": None},
        sight=mistral_sight(vision.mistral3, 2),
    ),
    Family(
        name="Ministral 3",
        architecture="Mistral3ForConditionalGeneration",
        config="Mistral3Config",
        fields={"model_type": "ministral3", **MINISTRAL3},
        sight=mistral_sight(vision.mistral3, 2),
        special="queries scaled by position",
    ),
    Family(
        name="Pixtral",
        architecture="LlavaForConditionalGeneration",
        config="LlavaConfig",
        sight=mistral_sight(vision.pixtral, 1),
        special="as Transformers writes it",
    ),
    Family(
        name="LLaVA-OneVision",
        architecture="LlavaOnevisionForConditionalGeneration",
        config="LlavaOnevisionConfig",
        sight=Sight(
            whole=vision.llava_onevision,
            processor=processors.llava_onevision,
            picture="<image>\n",
            video="<video>\n",
            tokens={"image_token": "<image>", "video_token": "<video>"},
        ),
        special="biases",
    ),
    Family(
        name="Idefics3",
        architecture="Idefics3ForConditionalGeneration",
        config="Idefics3Config",
        sight=Sight(
            whole=vision.idefics3,
            processor=processors.idefics3,
            picture="<image>",
            tokens={
                "image_token": "<image>",
                "fake": "<fake_token_around_image>",
                "end": "<end_of_utterance>",
                "whole": "<global-img>",
                **{f"part_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
            },
        ),
    ),
    Family(
        name="PaddleOCR-VL",
        architecture="PaddleOCRVLForConditionalGeneration",
        config="PaddleOCRVLConfig",
        sight=Sight(
            whole=vision.paddleocr_vl,
            processor=processors.paddleocr_vl,
            picture=QWEN_PICTURE,
            tokens={"image_token": "<|image_pad|>"},
        ),
    ),
    Family(
        name="MiniCPM-V 4.6",
        architecture="MiniCPMV4_6ForConditionalGeneration",
        config="MiniCPMV4_6Config",
        sight=Sight(
            whole=vision.minicpmv4_6,
            processor=processors.minicpmv4_6,
            picture="<|image_pad|>",
            video="<|video_pad|>",
            tokens={
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "image_start_token": "<image>",
                "image_end_token": "</image>",
                "slice_start_token": "<slice>",
                "slice_end_token": "</slice>",
                "image_id_start_token": "<image_id>",
                "image_id_end_token": "</image_id>",
            },
        ),
        special="gated delta rule",
        dtype="bfloat16",
        page_quota=1,
    ),
    Family(
        name="LFM2-VL",
        architecture="Lfm2VlForConditionalGeneration",
        config="Lfm2VlConfig",
        sight=Sight(
            whole=vision.lfm2_vl,
            processor=processors.lfm2_vl,
            picture="<image>",
            tokens={"image_token": "<image>"},
        ),
        special="short convolutions",
        refused="recurrent state beside or instead of KV",
    ),
    Family(
        name="Gemma 3, pictures",
        architecture="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        sight=gemma3_sight(64),
        special="windows; pictures that attend both ways",
        modes=("v2", "compiled"),
        both_ways=True,
    ),
    Family(
        name="PaliGemma",
        architecture="PaliGemmaForConditionalGeneration",
        config="PaliGemmaConfig",
        fields={"hidden_activation": "gelu_pytorch_tanh"},
        sight=PALIGEMMA_SIGHT,
        special="pictures that attend both ways",
        both_ways=True,
    ),
    Family(
        name="PaliGemma 2",
        architecture="PaliGemmaForConditionalGeneration",
        config="PaliGemmaConfig",
        fields={
            "model_type": "gemma2",
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 128,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        sight=PALIGEMMA_SIGHT,
        special="windows, soft caps; pictures that attend both ways",
        both_ways=True,
    ),
    Family(
        name="Bagel",
        architecture="BagelForConditionalGeneration",
        config="BagelConfig",
        sight=Sight(whole=vision.bagel, processor=processors.bagel, picture="<|image_pad|>"),
        special="pictures that attend both ways, biases",
        both_ways=True,
    ),
    Family(
        name="Moondream 3",
        architecture="Moondream3ForCausalLM",
        config="Moondream3Config",
        sight=Sight(
            whole=vision.moondream3,
            processor=processors.moondream3,
            picture="<|endoftext|><image>",
            tokens={"image_token": "<image>"},
            large_pictures=1,
            most_pictures=1,
        ),
        # two requests with pictures in one step
        engine={"max_num_batched_tokens": 4096},
        special="pictures that attend both ways, experts, queries and values scaled by position",
        both_ways=True,
        refused="pictures whose tokens attend to later ones, in a model that was not tried",
    ),
    Family(
        name="Kimi-VL",
        architecture="KimiVLForConditionalGeneration",
        config="KimiVLConfig",
        fields=MLA,
        sight=qwen_sight(vision.kimi_vl, processors.qwen2_vl),
        special="MLA",
        refused="MLA, which has no KV heads to budget",
    ),
]
