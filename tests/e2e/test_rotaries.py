"""How queries turn in vLLM's own models, which are built and run here without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.engines import run_rotaries

HEAD_SIZE = 32
MAX_TOKENS = 4096
ORIGINAL_TOKENS = 1024
DECODER = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MINICPM3 = {
    "architectures": ["MiniCPM3ForCausalLM"],
    "model_type": "minicpm3",
    "scale_emb": 1,
    "dim_model_base": 128,
    "scale_depth": 1.4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "ffn_dim": 256,
    "do_layer_norm_before": True,
    "word_embed_proj_dim": 128,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MINISTRAL = {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "head_dim": HEAD_SIZE,
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
        "rope_theta": 1e6,
        "llama_4_scaling_beta": 0.1,
    },
}
HUNYUAN = {
    "architectures": ["HunYuanDenseV1ForCausalLM"],
    "model_type": "hunyuan_v1_dense",
    "head_dim": HEAD_SIZE,
}
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "no_rope_layers": [1, 1, 1, 0],
}
DYNAMIC = {
    **LLAMA,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "max_position_embeddings": ORIGINAL_TOKENS,
}
TRANSFORMERS = {"model_impl": "transformers"}
SHORT = {**TRANSFORMERS, "max_model_len": ORIGINAL_TOKENS}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, TRANSFORMERS),
    "hunyuan": (HUNYUAN, {}),
    "smollm3": (SMOLLM3, {}),
    "ministral3": (MINISTRAL, TRANSFORMERS),
    "dynamic": (DYNAMIC, TRANSFORMERS),
    "dynamic short": (DYNAMIC, SHORT),
    "minicpm3": (MINICPM3, {}),
    "opt": (OPT, {}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    models = {}
    for name, (description, engine) in MODELS.items():
        folder = tmp_path_factory.mktemp("model")
        config = json.dumps({**DECODER, **description})
        (folder / "config.json").write_text(config, encoding="utf-8")
        arguments = {"model": str(folder), "max_model_len": MAX_TOKENS, "dtype": "float32"}
        models[name] = {**arguments, **engine}
    return run_rotaries(tmp_path_factory.mktemp("answer"), models)


@pytest.mark.parametrize(
    ("name", "backend", "starts", "num_turning_layers"),
    [
        ("llama", "TransformersForCausalLM", [0], 4),
        ("hunyuan", "TransformersForCausalLM", [0], 4),
        ("smollm3", "TransformersForCausalLM", [0], 3),
        ("ministral3", "TransformersForCausalLM", [0], 4),
        ("dynamic short", "TransformersForCausalLM", [0], 4),
        ("minicpm3", "MiniCPM3ForCausalLM", [32], 4),
        ("opt", "OPTForCausalLM", [], 0),
    ],
)
def test_models(
    answers: dict[str, dict[str, Any]],
    name: str,
    backend: str,
    starts: list[int],
    num_turning_layers: int,
) -> None:
    """None of them has a whole head's rotary embedding beside its layers.

    So their queries stayed where they were, or the wrong elements were turned.
    """
    assert answers[name] == {
        "backend": backend,
        "layers": [*range(num_turning_layers)],
        "starts": starts,
        "has_gain": name == "hunyuan",
        "has_temperature": name == "ministral3",
    }


def test_a_rotation_that_follows_the_batch_is_refused(answers: dict[str, dict[str, Any]]) -> None:
    """Dynamic NTK in Transformers: the longest request of a batch sets the rotation of all."""
    refused = answers["dynamic"]["refused"]
    assert "4 of 4 layers (LlamaAttention)" in refused
    assert "a shorter --max-model-len if the model changes its rotation" in refused
