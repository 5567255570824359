"""What is read of layers and values, by whatever name a configuration has for them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_budgetkv.scheduler import banner
from vllm_budgetkv.scheduler.banner import Banner
from vllm_budgetkv.start import layer_kinds

MIMO = "MiMoV2FlashForCausalLM"
FULL, WINDOWED = "full_attention", "sliding_attention"


def model(architecture: str = MIMO, **text: Any) -> Any:
    return SimpleNamespace(
        architectures=[architecture],
        hf_text_config=SimpleNamespace(**text),
        get_head_size=lambda: 192,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, []),
        ({"layer_types": None}, []),
        ({"layer_types": [FULL, "conv"]}, [FULL, "conv"]),
        ({"hybrid_layer_pattern": [0, 1, 1]}, [FULL, WINDOWED, WINDOWED]),
        # vLLM's class reads no other name for them
        ({"hybrid_layer_pattern": [1, 0], "layer_types": [FULL, FULL]}, [WINDOWED, FULL]),
        ({"hybrid_layer_pattern": None, "layer_types": [FULL]}, [FULL]),
    ],
)
def test_kinds_of_layers(text: dict[str, Any], expected: list[str]) -> None:
    assert layer_kinds.layer_types(SimpleNamespace(**text)) == expected


@pytest.mark.parametrize(
    ("found", "value_size", "pads"),
    [
        (model(v_head_dim=128), 128, True),
        (model(v_head_dim=192), 192, False),
        (model(v_head_dim=None), 192, False),
        (model(v_head_dim=192, swa_head_dim=192, swa_v_head_dim=128), 192, True),
        (model(v_head_dim=128, swa_head_dim=128, swa_v_head_dim=None), 128, True),
        # of others it is not known before they are loaded, and refused then
        (model("LlamaForCausalLM", v_head_dim=128), 192, False),
    ],
)
def test_elements_of_values(found: Any, value_size: int, pads: bool) -> None:
    assert layer_kinds.value_size(found) == value_size
    assert layer_kinds.pads_values(found) is pads


def test_the_start_says_what_it_costs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banner, "logger", logging.getLogger("heard"))
    rules = SimpleNamespace(default=SimpleNamespace(quota=SimpleNamespace(compresses=False)))
    engine: Any = SimpleNamespace(model_config=model(v_head_dim=128))
    unused: dict[str, Any] = {"pool_blocks": 1, "blocks_beside": 0, "host_blocks": 0}
    config: Any = SimpleNamespace(policy="full", compresses=False)
    with caplog.at_level("INFO"):
        Banner(vllm_config=engine, config=config, rules=rules, **unused).log()
    assert caplog.messages[-1] == (
        "budgetkv: values of 128 elements take as much room as keys, of 192: keys and values are "
        "1.20 times as long as they need be"
    )
