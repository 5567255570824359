"""Pictures whose tokens attend both ways: what the start makes of such a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from vllm.engine.arg_utils import EngineArgs

import vllm_budgetkv
from tests.e2e import picture_models
from tests.e2e.conftest import MODELS
from vllm_budgetkv.start import pictures, refused_models
from vllm_budgetkv.start.activation import quota_of
from vllm_budgetkv.start.groups import groups_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BUDGET = {"policy": "hybrid", "page_quota": 6, "chunk_tokens": 64, "decode_interval_tokens": 16}


def configure(budget: dict[str, Any], **engine: Any) -> VllmConfig:
    vllm_budgetkv.register()
    arguments = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 8, **engine}
    arguments = {"max_num_batched_tokens": 256, "block_size": 32, **arguments}
    arguments["additional_config"] = {"budgetkv": {**BUDGET, **budget}}
    model = picture_models.build_gemma3(MODELS, 64)
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def pictures_of(config: VllmConfig) -> pictures.Pictures:
    return pictures.Pictures.of(config, quota_of(config))


@pytest.mark.parametrize(
    ("field", "tokens", "wish"),
    [
        ("max_num_scheduled_tokens", 70, r"--max-num-scheduled-tokens of at least 71 \(or a lower"),
        ("long_prefill_token_threshold", 60, "--long-prefill-token-threshold of at least 64$"),
    ],
)
def test_a_step_may_compute_less_than_its_buffers_hold(field: str, tokens: int, wish: str) -> None:
    """The bug: another option was named, which changed nothing."""
    config = configure({"page_quota": 128, "chunk_tokens": 8})
    setattr(config.scheduler_config, field, tokens)
    with pytest.raises(ValueError, match=f"of a request: use {wish}"):
        pictures.check(config, quota_of(config))


@pytest.mark.parametrize("asked", [False, True])
def test_our_scheduler_alone_keeps_pictures_whole(asked: bool) -> None:
    """vLLM asks for whole items on a GPU; a user may, too."""
    config = configure({}, disable_chunked_mm_input=asked)
    assert config.scheduler_config.disable_chunked_mm_input is False
    found = pictures_of(config)
    assert found.attend_both_ways
    assert (found.window_tokens, found.step.tokens) == (128, 64)
    groups = groups_of(config)
    assert (groups.num_layers, groups.num_windowed) == (quota_of(config).num_layers, 4)


@pytest.mark.parametrize(
    ("budget", "engine", "message"),
    [
        (
            {"chunk_tokens": 63},
            {},
            "a picture of the model has 64 tokens that attend to each other, but a step computes "
            "at most 63 of a request: use --kv-chunk-tokens of at least 64$",
        ),
        (
            {"page_quota": 128, "chunk_tokens": 8},
            {"max_num_batched_tokens": 70},
            r"most 63 of a request: use --max-num-batched-tokens of at least 71 \(or a lower ",
        ),
        ({"host_memory": "1GiB"}, {}, "host memory keeps no windows: remove --kv-host-memory"),
        ({}, {"tensor_parallel_size": 2}, "set --tensor-parallel-size 2 to 1"),
        ({}, {"pipeline_parallel_size": 2}, "set --pipeline-parallel-size 2 to 1"),
    ],
    ids=["chunk", "step", "host-memory", "devices", "stages"],
)
def test_what_is_not_served_is_said(
    budget: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(budget, **engine)


def test_a_quota_of_everything_asks_for_no_chunk() -> None:
    """What a step computes must hold a picture then."""
    found = pictures_of(configure({"page_quota": 128, "chunk_tokens": 8}))
    assert found.step.tokens == 256 - 7


def test_a_model_that_is_to_read_text_alone_has_no_pictures() -> None:
    """vLLM leaves its pictures out, and so may chunks be shorter than one."""
    config = configure({"chunk_tokens": 32}, limit_mm_per_prompt={"image": 0})
    assert not pictures_of(config).attend_both_ways


def test_other_models_with_such_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = configure({}).model_config
    monkeypatch.setattr(pictures, "BOTH_WAYS", {"PaliGemmaForConditionalGeneration"})
    assert refused_models.dead_ends(model) == [
        "the model has pictures whose tokens attend to later ones, in a model that was not tried: "
        "start without --kv-policy"
    ]


def test_the_size_of_a_picture_is_not_always_known() -> None:
    """What a prompt brings is looked at when it comes."""
    config = configure({})
    quota = replace(quota_of(config), chunk_tokens=8)
    with pytest.raises(ValueError, match="has 64 tokens that attend to each other"):
        pictures.check(config, quota)
    del config.model_config.hf_config.mm_tokens_per_image
    pictures.check(config, quota)
