"""The scales that a checkpoint has for keys and values of 8 bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_budgetkv.worker.engine_view import units_of


def test_units_are_those_of_the_layer() -> None:
    layer = SimpleNamespace(_k_scale_float=0.37, _v_scale_float=1e-6)
    assert units_of("model.layers.3.attn", layer) == (0.37, 1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["_k_scale_float", "_v_scale_float"])
def test_scales_that_are_none_are_told(scale: float, part: str) -> None:
    layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    setattr(layer, part, scale)
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.3\.attn by .* use --kv-cache-dtype"
    ):
        units_of("model.layers.3.attn", layer)
