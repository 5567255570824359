"""What cannot be served stops the start, with the reason and the option to change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import vllm_budgetkv

vllm_budgetkv.register()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402  (after the plugin, as vLLM itself does)

if TYPE_CHECKING:
    from pathlib import Path

QUOTA = {"policy": "hybrid", "page_quota": 64, "chunk_tokens": 256}


def create(model: Path, budget: dict[str, Any] | None = None, **engine: Any) -> Any:
    arguments = {"model": str(model), "max_model_len": 4096, "dtype": "float32", **engine}
    additional = {"budgetkv": QUOTA if budget is None else budget}
    return EngineArgs(additional_config=additional, **arguments).create_engine_config()


def test_a_good_configuration_names_our_classes(text_model: Path) -> None:
    config = create(text_model)
    assert config.scheduler_config.scheduler_cls.startswith("vllm_budgetkv.")
    assert config.parallel_config.worker_cls.startswith("vllm_budgetkv.")
    assert config.scheduler_config.long_prefill_token_threshold == 256
    assert config.cache_config.block_size == 16


def test_without_a_policy_the_configuration_is_stock(text_model: Path) -> None:
    config = EngineArgs(model=str(text_model), max_model_len=4096).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.long_prefill_token_threshold == 0


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is not supported: use auto"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 is not supported"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding is not supported: remove --speculative-config",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "remove --kv-transfer-config",
        ),
        ({"enable_chunked_prefill": False}, "use --enable-chunked-prefill"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "would replace ours"),
        ({"worker_cls": "some.where.Worker"}, "--worker-cls some.where.Worker would replace ours"),
        ({"long_prefill_token_threshold": 100}, "contradicts --kv-chunk-tokens 256"),
        ({"long_prefill_token_threshold_adaptive": True}, "must not outgrow the quota"),
        ({"disable_chunked_mm_input": True}, "remove --disable-chunked-mm-input"),
        ({"block_size": 48}, "a page of 48 tokens is not supported; set --block-size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_features(text_model: Path, engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(text_model, **engine)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"policy": "hybird", "page_quota": 9}, "unknown --kv-policy 'hybird'"),
        ({"policy": "hybrid", "page_quota": -1}, "at least 1; got -1"),
        ({"policy": "hybrid", "page_quota": "x"}, "whole number"),
        ({"policy": "hybrid", "page_quota": 9, "colour": 1}, "unknown budgetkv option"),
        (
            {"policy": "hybrid", "page_quota": 9},
            "too small for chunks of 1024 tokens over 2 layers",
        ),
    ],
    ids=["unknown-policy", "negative", "not-a-number", "unknown-option", "too-small"],
)
def test_refused_options(text_model: Path, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(text_model, budget)


def test_the_smallest_quota_that_is_named_works(text_model: Path) -> None:
    with pytest.raises(ValueError, match="too small") as error:
        create(text_model, {"policy": "window", "page_quota": 1})
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    create(text_model, {"policy": "window", "page_quota": smallest})


MODELS = {
    "sliding window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 128,
    },
    "MLA": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "recurrent state": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
    },
}


@pytest.mark.parametrize("reason", MODELS)
def test_refused_models(tmp_path: Path, text_model: Path, reason: str) -> None:
    config = json.loads((text_model / "config.json").read_text(encoding="utf-8"))
    config.update(MODELS[reason])
    for file in text_model.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=reason.replace(" ", ".")):
        create(tmp_path)
