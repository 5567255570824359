"""Models with recurrent layers beside attention, from their configuration: sizes, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

import vllm_budgetkv
from tests.families.catalogue import FAMILIES
from tests.families.folders import folder_of
from vllm_budgetkv.start.activation import quota_of
from vllm_budgetkv.testing.recurrent import build_qwen3_5

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODELS = Path(__file__).parents[2] / "build" / "models"
BUDGET = {"policy": "hybrid", "page_quota": 1, "chunk_tokens": 96, "decode_interval_tokens": 16}


@pytest.fixture(autouse=True)
def inspect_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports a model's class in a process of its own to look at it: 10 seconds each."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    # where a processor has them, vLLM's kernels want state in float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def configure(budget: dict[str, Any], **engine: Any) -> VllmConfig:
    vllm_budgetkv.register()
    arguments = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 8, **engine}
    arguments["additional_config"] = {"budgetkv": {**BUDGET, **budget}}
    return EngineArgs(model=str(build_qwen3_5(MODELS)), **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("engine", "page_tokens", "block_pages"),
    [
        ({}, 16, 8),
        ({"block_size": 32}, 32, 5),
        ({"block_size": 256}, 256, 1),
        ({"block_size": 512}, 16, 32),
        ({"mamba_ssm_cache_dtype": "float32"}, 16, 15),
    ],
    ids=["default", "longer-pages", "page-as-long-as-state", "longer-blocks", "longer-state"],
)
def test_a_block_is_as_long_as_state(
    engine: dict[str, Any], page_tokens: int, block_pages: int
) -> None:
    """35,072 bytes of bfloat16, on two heads whose pages of 16 tokens take 2,304."""
    config = configure({"page_quota": 4}, **engine)
    quota = quota_of(config)
    assert (quota.page_tokens, quota.block_pages) == (page_tokens, block_pages)
    assert config.cache_config.block_size == quota.block_tokens
    assert quota.num_layers == 2
    assert quota.tokens == 4 * page_tokens * block_pages


def test_a_quota_in_tokens_is_whole_blocks() -> None:
    config = configure({"page_quota": None, "quota_tokens": 300})
    assert quota_of(config).blocks == 2
    with pytest.raises(ValueError, match="smaller than one block of 128 tokens"):
        configure({"page_quota": None, "quota_tokens": 127})


@pytest.mark.parametrize(
    ("budget", "engine", "message"),
    [
        ({"host_memory": "1GiB"}, {}, "remove --kv-host-memory"),
        ({}, {"tensor_parallel_size": 2}, "set --tensor-parallel-size 2 to 1"),
        ({}, {"prefix_match_unit": 64}, "remove --prefix-match-unit 64"),
        ({}, {"num_gpu_blocks_override": 7}, "1 blocks of 128 tokens and 6 of recurrent state"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        (
            {},
            {"hf_overrides": {"layer_types": ["full_attention"] * 6 + ["linear_attention"] * 2}},
            "6 layers with keys and values beside 2 with recurrent state are several groups",
        ),
    ],
    ids=["host-memory", "devices", "match-unit", "pool", "one-manager", "few-recurrent"],
)
def test_what_is_not_served_is_said(
    budget: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(budget, **engine)


@pytest.mark.parametrize("name", ["Granite 4, hybrid", "Nemotron-H"])
def test_mamba2_on_a_cpu_has_no_prefix_cache(name: str) -> None:
    """Stock vLLM starts with it, and the first prompt ends its engine."""
    vllm_budgetkv.register()
    arguments: dict[str, Any] = {
        "model": str(folder_of(FAMILIES[name], MODELS)),
        "dtype": "float32",
        "max_model_len": 4096,
        "additional_config": {"budgetkv": BUDGET | {"page_quota": 4}},
    }
    with pytest.raises(ValueError, match="of Mamba2 on a CPU: add --no-enable-prefix-caching"):
        EngineArgs(**arguments, enable_prefix_caching=True).create_engine_config()
    config = EngineArgs(**arguments, enable_prefix_caching=False).create_engine_config()
    assert quota_of(config).num_layers == 2


def test_without_a_policy_nothing_changes() -> None:
    vllm_budgetkv.register()
    model = str(build_qwen3_5(MODELS))
    config = EngineArgs(model=model, dtype="bfloat16", max_model_len=4096).create_engine_config()
    assert config.cache_config.block_size == 128
    assert not config.cache_config.user_specified_block_size
    assert config.scheduler_config.scheduler_cls is None
