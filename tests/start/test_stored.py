"""How keys and values are stored on which device; options are in `tests/e2e/test_refusals.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_budgetkv.start import stored


def engine(cache_dtype: str) -> Any:
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        hf_config=SimpleNamespace(),
        hf_text_config=SimpleNamespace(),
        get_head_size=lambda: 128,
    )
    cache = SimpleNamespace(cache_dtype=cache_dtype, kv_cache_dtype_skip_layers=[])
    return SimpleNamespace(model_config=model, cache_config=cache)


def on(monkeypatch: pytest.MonkeyPatch, *, is_cuda: bool, capability: int) -> None:
    import vllm.platforms

    platform = SimpleNamespace(
        is_cuda=lambda: is_cuda, has_device_capability=lambda least: capability >= least
    )
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    assert vllm.platforms.current_platform is platform


@pytest.mark.parametrize(
    ("cache_dtype", "is_cuda", "capability", "is_refused"),
    [
        ("fp8", True, 80, True),
        ("fp8_e4m3", True, 86, True),
        ("fp8", True, 89, False),
        ("fp8", False, 0, False),
        ("auto", True, 80, False),
    ],
)
def test_a_gpu_without_8_bit_floats(
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: str,
    is_cuda: bool,
    capability: int,
    is_refused: bool,
) -> None:
    on(monkeypatch, is_cuda=is_cuda, capability=capability)
    told = [*stored.of_device(engine(cache_dtype))]
    assert len(told) == is_refused
    assert all("capability 8.9: use --kv-cache-dtype bfloat16" in reason for reason in told)


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "auto", "bfloat16"])
def test_the_layout_follows(cache_dtype: str) -> None:
    layout = stored.layout_of(engine(cache_dtype), 16)
    assert layout.dtype == torch.bfloat16
    is_quantised = cache_dtype.startswith("fp8")
    assert layout.kv_dtype == (torch.float8_e4m3fn if is_quantised else torch.bfloat16)
    assert stored.element_bytes(engine(cache_dtype)) == layout.kv_dtype.itemsize
