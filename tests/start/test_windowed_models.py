"""Models with windows or chunks beside full attention, from their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

import vllm_budgetkv
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.start import layer_kinds, pictures, refused_models, stored
from vllm_budgetkv.start.activation import quota_of
from vllm_budgetkv.start.groups import groups_of
from vllm_budgetkv.testing import mimo_v2, sliding

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODELS = Path(__file__).parents[2] / "build" / "models"
BUDGET = {"policy": "hybrid", "page_quota": 12, "chunk_tokens": 96, "decode_interval_tokens": 16}
CHUNKED = "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"


@pytest.fixture(autouse=True)
def inspect_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports a model's class in a process of its own to look at it: 10 seconds each."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


def configure(kind: str, budget: dict[str, Any], **engine: Any) -> VllmConfig:
    vllm_budgetkv.register()
    arguments = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 8, **engine}
    arguments = {"max_num_batched_tokens": 256, "block_size": 32, **arguments}
    arguments["additional_config"] = {"budgetkv": {**BUDGET, **budget}}
    model = mimo_v2.build(MODELS) if kind == "mimo_v2" else sliding.build(kind, MODELS)
    return EngineArgs(model=str(model), **arguments).create_engine_config()


@pytest.mark.parametrize("kind", sliding.FAMILIES)
def test_the_quota_is_of_full_layers_alone(kind: str) -> None:
    config, num_layers = configure(kind, {}), sliding.num_full_layers(kind)
    assert quota_of(config).num_layers == num_layers
    assert (quota_of(config).page_tokens, quota_of(config).block_pages) == (32, 1)
    groups = groups_of(config)
    assert (groups.num_layers, groups.num_windowed) == (num_layers, 6 - num_layers)
    assert groups.blocks_beside == 0


@pytest.mark.parametrize("architecture", sorted(layer_kinds.PADDED))
def test_layers_that_are_named_by_numbers(architecture: str) -> None:
    """MiMo-V2: its configuration says chunks of tokens too, which no layer has."""
    config = configure("mimo_v2", {}, hf_overrides={"architectures": [architecture]})
    groups = groups_of(config)
    assert (groups.num_layers, groups.num_windowed) == (mimo_v2.num_full_layers(), 4)
    assert quota_of(config).num_layers == mimo_v2.num_full_layers()
    assert layer_kinds.pads_values(config.model_config)
    assert stored.layout_of(config, 32) == PageLayout(32, mimo_v2.HEAD_SIZE, torch.float32)


def test_every_family_that_is_served_is_tried() -> None:
    built = {family.model for family in sliding.FAMILIES.values()}
    # those that see are tried by `tests.families`
    assert built | layer_kinds.PADDED == refused_models.WINDOWS_BESIDE - pictures.BOTH_WAYS


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"tensor_parallel_size": 2}, "set --tensor-parallel-size 2 to 1"),
        ({"pipeline_parallel_size": 2}, "set --pipeline-parallel-size 2 to 1"),
        (
            {"hf_overrides": {"v_head_dim": 128}},
            "values of 128 elements, more than the 96 of its keys: start without --kv-policy",
        ),
        (
            {"hf_overrides": {"swa_v_head_dim": 128}},
            "values of 128 elements, more than the 96 of its keys: start without --kv-policy",
        ),
        (
            {"hf_overrides": {"add_full_attention_sink_bias": True}},
            "the model has learned attention sinks: start without --kv-policy",
        ),
        (
            {"hf_overrides": {"architectures": ["MiMoV2OmniForCausalLM"]}},
            "the model has towers for pictures and sound that were not tried",
        ),
    ],
    ids=["devices", "stages", "wide", "wide-windows", "full-sinks", "omni"],
)
def test_what_is_not_served_of_mimo_v2(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("mimo_v2", {}, **engine)


@pytest.mark.parametrize(
    ("budget", "engine", "message"),
    [
        ({"host_memory": "1GiB"}, {}, "host memory keeps no windows: remove --kv-host-memory"),
        ({}, {"tensor_parallel_size": 2}, "set --tensor-parallel-size 2 to 1"),
        ({}, {"prefix_match_unit": 16}, "remove --prefix-match-unit 16"),
        (
            {},
            {"disable_hybrid_kv_cache_manager": True},
            "windows need blocks of their own: remove --disable-hybrid-kv-cache-manager",
        ),
        (
            {},
            {"disable_sliding_window": True, "max_model_len": 64},
            "something else without them: remove --disable-sliding-window$",
        ),
    ],
    ids=["host-memory", "devices", "match-unit", "one-manager", "no-windows"],
)
def test_what_is_not_served_is_said(
    budget: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure("gemma3", budget, **engine)


def test_chunks_need_groups_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHUNKED, "0")
    with pytest.raises(ValueError, match=f"windows need blocks of their own: unset {CHUNKED}$"):
        configure("llama4", {})
