"""Models that no quota serves stop the start before anything is loaded, with advice that works."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import vllm_budgetkv

vllm_budgetkv.register()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402  (after the plugin, as vLLM itself does)
from vllm.model_executor.models import ModelRegistry, registry  # noqa: E402

from vllm_budgetkv.start import refused_models  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

# than 0.32
IN_NEWER_VERSIONS = {
    "FlintForCausalLM",
    "Step5ForCausalLM",
    "Step5ForConditionalGeneration",
}
# layers as full, sliding, full, sliding
MIXED = {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}

# architecture, model type, other fields, what the message says
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "prefix LM": (
        "HrmTextForCausalLM",
        "hrm_text",
        {},
        "of the prompt that attend to later",
    ),
    "MLA": ("DeepseekV2ForCausalLM", "deepseek_v2", MLA, "MLA, which has no KV heads"),
    "recurrent": ("FalconH1ForCausalLM", "falcon_h1", {}, "recurrent state"),
    "window": ("MistralForCausalLM", "mistral", {"sliding_window": 128}, "windows of 128 tokens"),
    "windows": ("ApertusForCausalLM", "apertus", MIXED, "windows of 128 tokens"),
    "soft cap": (
        "LlamaForCausalLM",
        "llama",
        {"attn_logit_softcapping": 50.0},
        r"a soft cap of 50\.0",
    ),
    "sinks": (
        "LlamaForCausalLM",
        "llama",
        {"attention_sinks": True},
        "learned attention sinks",
    ),
    "chunks alone": (
        "Llama4ForCausalLM",
        "llama4_text",
        EXPERTS
        | {"attention_chunk_size": 64, "pad_token_id": None}
        | {"no_rope_layers": [1, 1], "layer_types": ["chunked_attention"] * 2},
        "attention in chunks of 64 tokens",
    ),
    "window behind the prompt": (
        "UnlimitedOCRForCausalLM",
        "unlimited-ocr",
        {"rswa_window": 128, "language_config": {"num_attention_heads": 4, "hidden_size": 128}},
        "sliding window of 128 tokens behind the prompt",
    ),
    "sparse": (
        "MiniMaxM3SparseForConditionalGeneration",
        "minimax_m3_vl",
        {"text_config": EXPERTS | {"num_attention_heads": 4, "num_hidden_layers": 2}},
        "sparse attention with a cache of its own",
    ),
    "convolutions": ("InklingForCausalLM", "inkling_model", {}, "convolutions and sliding windows"),
    "dual chunks": (
        "Qwen2ForCausalLM",
        "qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 16}},
        "dual chunk attention",
    ),
    "ALiBi": ("BloomForCausalLM", "bloom", {"n_head": 4, "n_layer": 2}, "ALiBi"),
    "both ways": ("Qwen2ForCausalLM", "qwen2", {"is_causal": False}, "attend to later ones"),
    "shared layers": (
        "LlamaForCausalLM",
        "llama",
        {"num_kv_shared_layers": 1},
        "layers that read the cache of another",
    ),
    "head size": ("LlamaForCausalLM", "llama", {"head_dim": 512}, "heads of 512 elements"),
    "another layer": (
        "LlamaForCausalLM",
        "llama",
        {"layer_types": ["full_attention", "window_attention"]},
        "layers of type window_attention",
    ),
    "granite sinks": (
        "GraniteForCausalLM",
        "granite",
        {"layer_types": ["full_attention", "full_attention"]},
        "learned attention sinks",
    ),
    "speech": ("WhisperForConditionalGeneration", "whisper", {}, "cross attention to an encoder"),
    "no text": ("BertModel", "bert", {}, "writes no text"),
}


@pytest.fixture(autouse=True)
def inspect_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports a model's class in a process of its own to look at it: 10 seconds each."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture(autouse=True)
def environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sets it for a model that we refuse, and then compiles no other in the process."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")


@pytest.fixture
def folder(tmp_path: Path, text_model: Path) -> Path:
    """The tokenizer of a small model; `write` adds the configuration of another one."""
    for file in text_model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


def write(folder: Path, text_model: Path, architecture: str, kind: str, **fields: Any) -> None:
    config = json.loads((text_model / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [architecture], "model_type": kind, "head_dim": 32, **fields}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def create(folder: Path, **engine: Any) -> Any:
    budget = {"policy": "hybrid", "page_quota": 64, "chunk_tokens": 256}
    return EngineArgs(
        model=str(folder),
        dtype="float32",
        load_format="dummy",
        additional_config={"budgetkv": budget},
        **engine,
    ).create_engine_config()


def refusal(folder: Path, **engine: Any) -> str:
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        create(folder, **engine)
    return str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_refused_models(folder: Path, text_model: Path, name: str) -> None:
    architecture, kind, fields, message = MODELS[name]
    write(folder, text_model, architecture, kind, **fields)
    with pytest.raises(ValueError, match=message) as error:
        create(folder)
    text = str(error.value)
    assert "start without --kv-policy" in text
    assert "--enable-chunked-prefill" not in text, "vLLM may have switched it off itself"
    assert ("--disable-sliding-window" in text) == (name == "window")
    assert len(text.splitlines()) == 2, "one reason, and none that no option mends"


@pytest.mark.parametrize(
    ("architecture", "kind", "fields"),
    [
        ("MistralForCausalLM", "mistral", {"sliding_window": 128}),
        ("MixtralForCausalLM", "mixtral", {"sliding_window": 128, "num_local_experts": 2}),
        ("Phi3ForCausalLM", "phi3", {"sliding_window": 128}),
        ("Starcoder2ForCausalLM", "starcoder2", {"sliding_window": 128}),
        *(
            (f"Qwen{n}ForCausalLM", f"qwen{n}", {"sliding_window": 128, "use_sliding_window": True})
            for n in (2, 3)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_that_can_go(
    folder: Path, text_model: Path, architecture: str, kind: str, fields: dict[str, Any]
) -> None:
    write(folder, text_model, architecture, kind, max_window_layers=0, **fields)
    assert "or with --disable-sliding-window, which serves" in refusal(folder)
    config = create(folder, disable_sliding_window=True)
    assert config.model_config.max_model_len == 128
    assert kind in refused_models.WINDOW_CAN_GO


@pytest.mark.parametrize(
    ("architecture", "kind", "fields", "is_served"),
    [
        ("ApertusForCausalLM", "apertus", MIXED, False),
        ("Exaone4ForCausalLM", "exaone4", MIXED, True),
        ("Gemma2ForCausalLM", "gemma2", MIXED | {"attn_logit_softcapping": 50.0}, True),
        ("GptOssForCausalLM", "gpt_oss", MIXED | EXPERTS, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_that_cannot_go(
    folder: Path,
    text_model: Path,
    architecture: str,
    kind: str,
    fields: dict[str, Any],
    is_served: bool,
) -> None:
    write(folder, text_model, architecture, kind, **fields)
    text = refusal(folder, disable_sliding_window=True)
    assert "remove --disable-sliding-window" in text
    assert ("start without --kv-policy" in text) != is_served


def test_a_window_that_no_layer_has_is_served(folder: Path, text_model: Path) -> None:
    full = {"layer_types": ["full_attention"] * 2, "sliding_window": 128}
    write(folder, text_model, "LlamaForCausalLM", "llama", **full)
    assert create(folder).cache_config.sliding_window is None


def test_an_option_is_named_beside_a_window_that_can_go(folder: Path, text_model: Path) -> None:
    write(folder, text_model, "MistralForCausalLM", "mistral", sliding_window=128)
    assert "--kv-cache-dtype fp8_e5m2" in refusal(folder, kv_cache_dtype="fp8_e5m2")


def test_classes_that_are_always_refused_exist() -> None:
    known = {*ModelRegistry.get_supported_archs(), *IN_NEWER_VERSIONS}
    assert {name for name in refused_models.ALWAYS if name[0].isupper()} <= known
