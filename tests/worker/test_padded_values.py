"""Values of fewer elements than keys, between what a layer has and what its pages hold."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn_diffkv import TritonAttentionDiffKVBackend
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_budgetkv.start import platforms
from vllm_budgetkv.worker import cpu_windows, padded_values
from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.cpu_windows import CPUWindowAttention, CPUWindowBackend

T, HQ, H, D, DV = 5, 4, 2, 48, 32
WINDOW = {"per_layer_sliding_window": 64}
GPU = replace(platforms.CPU, window_backend=None)
FLASH = AttentionBackendEnum.FLASH_ATTN_DIFFKV


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_zeros_stand_behind_a_value() -> None:
    value = draw(T, H, DV)
    found = padded_values.padded(value, D)
    assert found.shape == (T, H, D)
    assert torch.equal(found[..., :DV], value) and not found[..., DV:].any()
    assert padded_values.padded(value, DV) is value


def test_the_front_of_an_output_is_kept() -> None:
    """Into the caller's memory, which may be a part of something else."""
    whole, wide = torch.zeros(T + 1, HQ, DV), draw(T, HQ, D)
    with padded_values.widened(whole[:T], D) as room:
        room.copy_(wide)
    assert torch.equal(whole[:T], wide[..., :DV]) and not whole[T:].any()
    with padded_values.widened(whole, DV) as room:
        assert room is whole


def test_values_of_more_elements_are_no_pages() -> None:
    with pytest.raises(AssertionError, match="more elements than keys"):
        padded_values.padded(draw(T, H, D), DV)


class Recorder:
    """A step whose attention doubles the values of the first head."""

    def run_layer(
        self, name: str, query: Any, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert key.shape == value.shape and out.shape == query.shape
        out.copy_(2 * value[:, :1])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("value_size", [DV, D])
def test_a_layer_of_ours(value_size: int, flat: bool) -> None:
    value = draw(T, H, value_size)
    output = torch.empty(T, HQ * value_size) if flat else torch.empty(T, HQ, value_size)
    layer, impl = SimpleNamespace(layer_name="attn"), BudgetAttention(HQ, D, 1.0, H)
    step: Any = Recorder()
    returned = impl.forward(layer, draw(T, HQ, D), draw(T, H, D), value, value, step, output)
    assert returned is output
    expected = (2 * value[:, :1]).expand(T, HQ, value_size)
    assert torch.equal(output.view(T, HQ, value_size), expected)


def test_a_layer_with_windows_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel sees keys and values of one size."""
    stored: list[torch.Tensor] = []

    def forward(self: Any, layer: Any, *tensors: torch.Tensor) -> None:
        query, _, value, _, _, output = tensors[:6]
        assert output.shape == query.shape
        output.copy_(2 * value[:, :1])

    base = cpu_windows.CPUAttentionBackendImpl
    monkeypatch.setattr(base, "forward", forward)
    monkeypatch.setattr(
        base, "do_kv_cache_update", lambda self, *tensors: stored.append(tensors[2])
    )
    impl: Any = CPUWindowAttention.__new__(CPUWindowAttention)
    impl.head_size = D
    key, value, output = draw(T, H, D), draw(T, H, DV), torch.empty(T, HQ, DV)
    impl.do_kv_cache_update(None, key, value, None, None)
    assert torch.equal(stored[0], padded_values.padded(value, D))
    batch = SimpleNamespace(pictures=None)
    assert impl.forward(None, draw(T, HQ, D), key, value, None, batch, output) is output
    assert torch.equal(output, (2 * value[:, :1]).expand(T, HQ, DV))


def test_its_pages_are_as_wide() -> None:
    sizes: Any = {"block_size": 32, "num_kv_heads": H, "head_size": D, "dtype": torch.float32}
    narrow = SlidingWindowSpec(**sizes, sliding_window=64, head_size_v=DV)
    spec = CPUWindowBackend.customize_spec(narrow)
    assert spec == SlidingWindowSpec(**sizes, sliding_window=64)
    assert spec.page_size_bytes * (D + DV) == narrow.page_size_bytes * 2 * D
    assert CPUWindowBackend.customize_spec(spec) == spec


@pytest.mark.parametrize(
    ("platform", "window", "expected"),
    [
        (platforms.CPU, {}, None),
        (platforms.CPU, WINDOW, None),
        (GPU, {}, None),
        (GPU, WINDOW, TritonAttentionDiffKVBackend),
    ],
    ids=["cpu", "cpu-window", "gpu", "gpu-window"],
)
def test_which_layers_keep_a_backend_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    platform: platforms.Platform,
    window: dict[str, int],
    expected: type | None,
) -> None:
    from vllm.model_executor.models import mimo_v2

    built: dict[str, Any] = {}
    monkeypatch.setattr(platforms, "current", lambda: platform)
    monkeypatch.setattr(TritonAttentionDiffKVBackend, "head_size_v", 128)
    monkeypatch.setattr(mimo_v2, "Attention", lambda *args, **given: built.update(given))
    with padded_values.chosen_as_others(model_with(DV)):
        mimo_v2.Attention(HQ, D, attn_backend=FLASH.get_class(), head_size_v=DV, **window)
    assert built["attn_backend"] is expected
    assert built["head_size_v"] == DV
    assert built["per_layer_sliding_window"] == window.get("per_layer_sliding_window")
    assert TritonAttentionDiffKVBackend.head_size_v == (DV if expected else 128)


@pytest.mark.parametrize("value_size", [DV, D])
def test_only_a_model_with_such_values_is_touched(value_size: int) -> None:
    from vllm.model_executor.models import mimo_v2

    original = mimo_v2.Attention
    with padded_values.chosen_as_others(model_with(value_size)):
        assert (mimo_v2.Attention is original) == (value_size == D)
    assert mimo_v2.Attention is original
    with pytest.raises(RuntimeError), padded_values.chosen_as_others(model_with(value_size)):
        raise RuntimeError
    assert mimo_v2.Attention is original


def model_with(value_size: int) -> Any:
    """A configuration of a model whose keys have D elements."""
    return SimpleNamespace(
        architectures=["MiMoV2FlashForCausalLM"],
        hf_text_config=SimpleNamespace(v_head_dim=value_size),
        get_head_size=lambda: D,
    )
