"""How queries turn in vLLM's own models, which are built and run here without an engine."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vllm_budgetkv

vllm_budgetkv.register()

from vllm.config import set_current_vllm_config  # noqa: E402  (after the plugin, as vLLM does)
from vllm.distributed import parallel_state  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader.utils import (  # noqa: E402
    initialize_model,
    process_weights_after_loading,
)

from vllm_budgetkv.cache.probe.rotaries import find_rotaries  # noqa: E402
from vllm_budgetkv.worker.query_samples import sample_queries  # noqa: E402
from vllm_budgetkv.worker.worker import backend_registered  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_budgetkv.cache.probe.bank import Rotary

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


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The groups of processes in which vLLM's layers are built."""
    store = tmp_path_factory.mktemp("store") / "store"
    parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def rotaries_of(
    folder: Path, description: dict[str, Any], **engine: Any
) -> tuple[str, dict[int, Rotary]]:
    """Class of a model with random weights, and how the queries of its layers turn."""
    (folder / "config.json").write_text(json.dumps({**DECODER, **description}), encoding="utf-8")
    arguments = {"max_model_len": MAX_TOKENS, "dtype": "float32", **engine}
    config = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, **arguments
    ).create_engine_config()
    with set_current_vllm_config(config), backend_registered():
        parallel_state.ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(std=0.1, generator=generator)
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    runner = SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        supports_mm_inputs=False,
        lora_config=None,
        maybe_dummy_run_with_lora=lambda *_: nullcontext(),
    )
    layers = config.compilation_config.static_forward_context
    found = find_rotaries(
        model,
        config.model_config.hf_text_config,
        partial(sample_queries, runner, config),
        config.model_config.max_model_len,
        8,
        {name: index for index, name in enumerate(layers)},
    )
    return type(model).__name__, found


@pytest.mark.parametrize(
    ("description", "engine", "backend", "start", "turning_layers"),
    [
        (LLAMA, TRANSFORMERS, "TransformersForCausalLM", 0, 4),
        (HUNYUAN, {}, "TransformersForCausalLM", 0, 4),
        (SMOLLM3, {}, "TransformersForCausalLM", 0, 3),
        (MINISTRAL, TRANSFORMERS, "TransformersForCausalLM", 0, 4),
        (MINICPM3, {}, "MiniCPM3ForCausalLM", 32, 4),
        (OPT, {}, "OPTForCausalLM", 0, 0),
    ],
    ids=["llama", "hunyuan", "smollm3", "ministral3", "minicpm3", "opt"],
)
def test_models(
    tmp_path: Path,
    description: dict[str, Any],
    engine: dict[str, Any],
    backend: str,
    start: int,
    turning_layers: int,
) -> None:
    """None of them has a whole head's rotary embedding beside its layers.

    So their queries stayed where they were, or the wrong elements were turned.
    """
    found_backend, found = rotaries_of(tmp_path, description, **engine)
    assert found_backend == backend
    assert list(found) == [*range(turning_layers)]
    assert {rotary.start for rotary in found.values()} <= {start}
    assert any(rotary.gain is not None for rotary in found.values()) == (description is HUNYUAN)
    assert any(rotary.temperature for rotary in found.values()) == (description is MINISTRAL)


def test_a_rotation_that_follows_the_batch_is_refused(tmp_path: Path) -> None:
    """Dynamic NTK in Transformers: the longest request of a batch sets the rotation of all."""
    with pytest.raises(ValueError, match="a shorter --max-model-len if the model changes"):
        rotaries_of(tmp_path, DYNAMIC, **TRANSFORMERS)
    rotaries_of(tmp_path, DYNAMIC, **TRANSFORMERS, max_model_len=ORIGINAL_TOKENS)
