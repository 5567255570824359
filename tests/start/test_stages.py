"""Several stages of a pipeline: whose layers a quota counts, and what is refused with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from vllm.config import CompilationMode, VllmConfig

from tests.e2e.conftest import MODELS
from tests.scheduler.engine_core import configure
from vllm_budgetkv.start.activation import config_of, quota_of
from vllm_budgetkv.start.stages import layers_of_stages, reasons, spreads_over_layers
from vllm_budgetkv.testing import sliding
from vllm_budgetkv.testing.models import build_qwen2

if TYPE_CHECKING:
    from pathlib import Path

TWO = {"pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2(tmp_path_factory.mktemp("models"), layers=3)


def test_a_quota_counts_the_layers_of_a_stage(qwen2: Path) -> None:
    """The chunk of a layer is spread over those that share a pool, which are half as many."""
    whole, stage = quota_of(configure(qwen2)), quota_of(configure(qwen2, **TWO))
    assert (whole.num_layers, stage.num_layers) == (2, 1)
    assert whole.budget_tokens - stage.budget_tokens == whole.chunk_tokens // 2


def test_the_same_quota_whichever_rank_reads_it(qwen2: Path) -> None:
    config = configure(qwen2, **TWO, tensor_parallel_size=2)
    assert layers_of_stages(config) == [1, 1]
    before = quota_of(config)
    config.parallel_config.rank = 3
    assert layers_of_stages(config) == [1, 1]
    assert config.parallel_config.rank == 3
    assert quota_of(config) == before


@pytest.mark.parametrize(
    ("engine", "policy", "budget", "message"),
    [
        ({}, "pyramidkv", {}, "policy pyramidkv shares a budget among the layers"),
        ({}, "window", {"request_policies": "pyramidkv"}, "policy pyramidkv shares a budget"),
        ({}, "hybrid", {"host_memory": "64MiB"}, "remove --kv-host-memory or set --pipeline-"),
        ({}, "window", {"trace_file": "trace.jsonl"}, "remove --kv-trace-file or set --pipeline-"),
        ({"enforce_eager": True}, "window", {}, "remove --enforce-eager, or mode 0"),
        ({"enable_lora": True}, "window", {}, "model: remove --enable-lora, or set --pipeline"),
        (
            {"compilation_config": {"mode": 0}},
            "window",
            {},
            "V1 serves --pipeline-parallel-size 2 only as it compiles the model",
        ),
    ],
)
def test_what_is_not_served_with_stages(
    qwen2: Path, engine: dict[str, Any], policy: str, budget: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(qwen2, policy, budget=budget, **engine, **TWO)
    if "kv-" not in message:
        configure(qwen2, policy, budget=budget, **engine)


def test_stages_of_other_lengths_are_refused(
    three_layers: Path, qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"gives them \[2, 1\]: set it to a divisor of 3"):
        configure(three_layers, **TWO)
    configure(three_layers, pipeline_parallel_size=3)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,0")
    with pytest.raises(ValueError, match="unset VLLM_PP_LAYER_PARTITION"):
        configure(qwen2, **TWO)


def test_an_eager_model_runner_v2_is_served(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(qwen2, **TWO)
    config.compilation_config.mode = CompilationMode.NONE
    assert len([*reasons(config, config_of(config))]) == 1
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    assert not [*reasons(config, config_of(config))]


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "gemma3"])
def test_layers_with_windows_are_refused(name: str) -> None:
    """As many full layers as a stage has in all, so that none seemed to have a window."""
    model = sliding.build(name, MODELS)
    with pytest.raises(ValueError, match="tried on several devices: set --pipeline-parallel-size"):
        configure(model, **TWO)


def test_a_trial_that_a_variable_leaves_out(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    with pytest.raises(
        ValueError, match="unset VLLM_CPU_CI_ENV, or set --pipeline-parallel-size 2 to 1"
    ):
        configure(qwen2, **TWO)


def test_which_policies_spread_a_budget_over_layers() -> None:
    assert [p for p in ("hybrid", "snapkv", "pyramidkv", "sparsemm") if spreads_over_layers(p)] == [
        "pyramidkv",
        "sparsemm",
    ]
