"""Models that compute another attention than ours, told from their configuration.

The layers themselves exist only once a worker loads the model; `worker/attention.py` and
`scheduler/spec.py` refuse there what no configuration tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.layout import MAX_HEAD_SIZE, MIN_HEAD_SIZE
from vllm_budgetkv.start import pictures
from vllm_budgetkv.start.layer_kinds import PADDED, head_sizes, layer_types

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import ModelConfig

BOTH_WAYS = "tokens of the prompt that attend to later ones, so chunks cannot be cut"
OTHER_HEADS = "layers that differ in their heads"
SINKS = "learned attention sinks"
SPARSE = "sparse attention with a cache of its own to find keys"

# what a class of vLLM always builds, whatever its configuration says; multimodal models name their
# language model by `architectures` or `model_type` of its configuration
ALWAYS = {
    "HrmTextForCausalLM": BOTH_WAYS,
    "FlintForCausalLM": SINKS,
    "MiniMaxM3SparseForCausalLM": SPARSE,
    "MiniMaxM3SparseForConditionalGeneration": SPARSE,
    "InklingForCausalLM": "convolutions and sliding windows inside its attention",
    "InklingForConditionalGeneration": "convolutions and sliding windows inside its attention",
    "IQuestLoopCoderForCausalLM": "layers that run several times with a cache for each",
    "MiMoV2OmniForCausalLM": "towers for pictures and sound that were not tried",
    "Step1ForCausalLM": "ALiBi, a bias by distance",
    "Step3p5ForCausalLM": OTHER_HEADS,
    "Step5ForCausalLM": SPARSE,
    "Step5ForConditionalGeneration": SPARSE,
    "VoxtralRealtimeGeneration": "an audio encoder with a cache of its own",
}

# fields of a text configuration that turn something on, and what
SWITCHES = {
    "attention_chunk_size": "attention in chunks of {} tokens",
    "dual_chunk_attention_config": "dual chunk attention",
    "attn_logit_softcapping": "attention logits with a soft cap of {}",
    "num_kv_shared_layers": "layers that read the cache of another layer",
    "interleaved_sliding_window": "sliding windows of {} tokens",
    "param_sink_number": "{} learned attention sinks",
    "attention_sinks": SINKS,
    "add_swa_attention_sink_bias": SINKS,
    "add_full_attention_sink_bias": SINKS,
    "swa_attention_sink_enabled": SINKS,
}

# a layer of another type computes something else; one of `chunked_attention` does so only with
# `attention_chunk_size`, one of `sliding_attention` with `sliding_window`
FULL_LAYER_TYPES = {"full_attention", "attention", "chunked_attention", "sliding_attention"}
WINDOWED_LAYER_TYPES = {"chunked_attention", "sliding_attention"}
STATE_LAYER_TYPES = {"conv", "linear_attention", "mamba"}
# of models with recurrent layers, which count what others have behind each attention
CACHELESS_LAYER_TYPES = {"mlp", "moe"}

# models that compute the same with --disable-sliding-window as without, up to their window; others
# lose their rotary embedding with it, or do not start
WINDOW_CAN_GO = {"mistral", "mixtral", "phi3", "qwen2", "qwen3", "starcoder2"}


# models with recurrent layers beside full attention whose state vLLM may keep in the pool; others
# were not tried
STATE_BESIDE = {
    "GraniteMoeHybridForCausalLM",
    "Lfm2ForCausalLM",
    "MiniCPMV4_6ForConditionalGeneration",
    "NemotronHForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
}


# of them those with Mamba2, whose states between chunks vLLM's kernel for CPUs does not return
MAMBA2 = {"GraniteMoeHybridForCausalLM", "NemotronHForCausalLM"}


# models with windows or chunks in some layers and full attention in others, which alone are under
# the quota; others were not tried
WINDOWS_BESIDE = {
    "Cohere2ForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM",
    "MinistralForCausalLM",
    "MistralForCausalLM",
    "Olmo3ForCausalLM",
    # its second version
    "PaliGemmaForConditionalGeneration",
}


def keeps_state(model: ModelConfig) -> bool:
    """Whether layers beside those under the quota keep recurrent state, in a way that is served."""
    return model.is_hybrid and bool(STATE_BESIDE.intersection(model.architectures))


def has_mamba2(model: ModelConfig) -> bool:
    """Whether recurrent layers of a model that is served are Mamba2."""
    return keeps_state(model) and bool(MAMBA2.intersection(model.architectures))


def keeps_windows(model: ModelConfig) -> bool:
    """Whether layers beside those under the quota keep windows, in a way that is served."""
    if not WINDOWS_BESIDE.intersection(model.architectures) or model.disable_sliding_window:
        return False
    kinds = _layer_types(model.hf_text_config)
    return "full_attention" in kinds and bool(kinds & WINDOWED_LAYER_TYPES)


def num_full_layers(model: ModelConfig) -> int:
    """Layers with full attention of a model that has layers of several kinds."""
    full = FULL_LAYER_TYPES - WINDOWED_LAYER_TYPES
    return sum(kind in full for kind in layer_types(model.hf_text_config))


def num_state_layers(model: ModelConfig) -> int:
    """Layers with recurrent state of a model that keeps it."""
    return sum(kind in STATE_LAYER_TYPES for kind in model.hf_text_config.layer_types)


def dead_ends(model: ModelConfig) -> list[str]:
    """Why no option makes `model` work under a quota; empty if it may."""
    found = dict.fromkeys([*_of_the_whole(model), *_of_layers(model)])
    if not found:
        return []
    return [f"the model has {', '.join(found)}: start without --kv-policy"]


def sliding_window(model: ModelConfig) -> Iterator[str]:
    """Why a model with sliding windows is refused, and what to change where that was tried."""
    if keeps_windows(model):
        return
    text = model.hf_text_config
    can_go, kinds = text.model_type in WINDOW_CAN_GO, _layer_types(text)
    window_tokens = model.get_sliding_window()
    if kinds and "sliding_attention" not in kinds:
        # no layer has the window that the configuration names
        return
    if window_tokens is None:
        if kinds and not can_go:
            yield _windows_of_layers(model)
        return
    or_else = (
        f", or with --disable-sliding-window, which serves prompt and output of at most "
        f"{window_tokens} tokens together"
    )
    yield (
        f"the model has sliding windows of {window_tokens} tokens, which bound their cache by "
        f"themselves: start without --kv-policy{or_else if can_go else ''}"
    )


def _windows_of_layers(model: ModelConfig) -> str:
    if model.disable_sliding_window:
        is_served = WINDOWS_BESIDE.intersection(model.architectures)
        return (
            "the model has sliding windows and computes something else without them: remove "
            f"--disable-sliding-window{'' if is_served else ' and start without --kv-policy'}"
        )
    return "the model has sliding windows, another in each layer: start without --kv-policy"


def _of_the_whole(model: ModelConfig) -> Iterator[str]:
    """What vLLM itself says of the model."""
    if model.use_mla:
        yield "MLA, which has no KV heads to budget"
    if model.is_attention_free or (model.is_hybrid and not keeps_state(model)):
        yield "recurrent state beside or instead of KV"
    if model.is_encoder_decoder:
        yield "cross attention to an encoder"
    if model.is_mm_prefix_lm and not pictures.attend_both_ways(model):
        yield "pictures whose tokens attend to later ones, in a model that was not tried"
    if model.is_diffusion or not getattr(model.hf_text_config, "is_causal", True):
        yield BOTH_WAYS
    if model.rswa_window is not None:
        yield f"a sliding window of {model.rswa_window} tokens behind the prompt"
    if model.uses_alibi:
        yield "ALiBi, a bias by distance"
    if model.has_noops:
        yield "layers without attention"


def _of_layers(model: ModelConfig) -> Iterator[str]:
    """What follows from the class and the fields of the text configuration."""
    text = model.hf_text_config
    names = [*model.architectures, *(getattr(text, "architectures", None) or []), text.model_type]
    yield from (ALWAYS[name] for name in names if name in ALWAYS)
    for field, words in SWITCHES.items():
        if (value := getattr(text, field, None)) and not _is_served(field, model):
            yield words.format(value)
    if text.model_type in ("granite", "granitemoe") and _sinks_by_default(text):
        yield SINKS
    served = set(FULL_LAYER_TYPES)
    if keeps_state(model):
        served |= STATE_LAYER_TYPES | CACHELESS_LAYER_TYPES
    for kind in sorted(_layer_types(text) - served):
        yield f"layers of type {kind}"
    heads = ("total_num_attention_heads", "total_num_kv_heads", "head_size")
    overrides = model.model_arch_config.per_layer_overrides or []
    if any(name in layer for layer in overrides for name in heads):
        yield OTHER_HEADS
    head_size = model.get_head_size()
    # the head size of MLA is that of its latent
    if not model.use_mla and (not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE or head_size % 8):
        yield (
            f"heads of {head_size} elements, not a multiple of 8 from {MIN_HEAD_SIZE} to "
            f"{MAX_HEAD_SIZE}"
        )
    if PADDED.intersection(model.architectures):
        for key_size, value_size in head_sizes(model).values():
            if value_size > key_size:
                yield f"values of {value_size} elements, more than the {key_size} of its keys"


def _is_served(field: str, model: ModelConfig) -> bool:
    """Whether what a field of `SWITCHES` turns on is served in this model."""
    if field == "attn_logit_softcapping":
        return bool(WINDOWS_BESIDE.intersection(model.architectures))
    # sinks of layers with windows are vLLM's own affair
    return field in ("attention_chunk_size", "add_swa_attention_sink_bias") and keeps_windows(model)


def _layer_types(text: Any) -> set[str]:
    return set(layer_types(text))


def _sinks_by_default(text: Any) -> bool:
    """Granite models whose configuration names layer types have sinks unless it says no."""
    return bool(_layer_types(text)) and getattr(text, "attention_sinks", True)
