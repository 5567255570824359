"""Layers that no configuration told of are refused as soon as the model has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.gpu_worker import Worker

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.start.config import BudgetConfig
from vllm_budgetkv.start.request_rules import RequestRules
from vllm_budgetkv.worker.worker import BudgetWorker

QUOTA = Quota(blocks=64, page_tokens=16, num_layers=2, chunk_tokens=256, decode_interval_tokens=64)
SIZES: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
OURS = QuotaSpec.of(FullAttentionSpec(**SIZES), QUOTA)
STATE = MambaSpec(block_size=16, shapes=((2, 4),), dtypes=(torch.float32,))
OURS_TOO = {"a": OURS, "b": OURS}


def layer(num_heads: int = 4) -> Any:
    impl = SimpleNamespace(num_heads=num_heads, num_kv_heads=2, head_size=32)
    return SimpleNamespace(impl=impl)


def specs_of(
    monkeypatch: pytest.MonkeyPatch,
    specs: dict[str, KVCacheSpec],
    layers: dict[str, Any],
    *,
    is_hybrid: bool = False,
    architecture: str = "Qwen3NextForCausalLM",
) -> dict[str, KVCacheSpec]:
    """What a worker answers whose model has these layers."""
    monkeypatch.setattr(Worker, "get_kv_cache_spec", lambda self: specs)
    worker: Any = BudgetWorker.__new__(BudgetWorker)
    compilation = SimpleNamespace(static_forward_context=layers)
    text = SimpleNamespace(layer_types=["full_attention", "sliding_attention"])
    model = SimpleNamespace(
        is_hybrid=is_hybrid,
        architectures=[architecture],
        disable_sliding_window=False,
        hf_text_config=text,
    )
    worker.vllm_config = SimpleNamespace(compilation_config=compilation, model_config=model)
    worker.budget_config = BudgetConfig(policy="window", page_quota=QUOTA.blocks)
    worker.budget_rules = RequestRules(worker.budget_config, {"window": QUOTA})
    return worker.get_kv_cache_spec()


def test_plain_layers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert specs_of(monkeypatch, OURS_TOO, {"a": layer(), "b": layer()}) is OURS_TOO


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SlidingWindowSpec(**SIZES, sliding_window=64), "layer b of the model has a sliding wind"),
        (ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64), "has attention in chunks"),
        (MLAAttentionSpec(**SIZES), "has MLA, which no quota covers"),
        (FullAttentionSpec(**SIZES, non_causal=True), "has tokens that attend to later ones"),
        (STATE, "has recurrent state, which no quota covers"),
        (KVCacheSpec(block_size=16), r"a cache of another kind \(KVCacheSpec\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, KVCacheSpec) else "",
)
def test_other_layers_are_refused(
    monkeypatch: pytest.MonkeyPatch, spec: KVCacheSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*start without --kv-policy"):
        specs_of(monkeypatch, {"a": OURS, "b": spec}, {"a": layer(), "b": layer()})


def test_state_stays_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose configuration says that it has some: our layers are those with keys."""
    specs = {"state": STATE, **OURS_TOO}
    layers = {"state": SimpleNamespace(), "a": layer(), "b": layer()}
    assert specs_of(monkeypatch, specs, layers, is_hybrid=True) is specs
    window = {**specs, "b": SlidingWindowSpec(**SIZES, sliding_window=64)}
    with pytest.raises(ValueError, match="layer b of the model has a sliding window"):
        specs_of(monkeypatch, window, layers, is_hybrid=True)


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**SIZES, sliding_window=64),
        ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64),
    ],
    ids=["window", "chunks"],
)
def test_windows_stay_the_engines_own(monkeypatch: pytest.MonkeyPatch, spec: KVCacheSpec) -> None:
    """Of a model that was tried with them; whole caches of other kinds are refused there too."""
    specs, name = {"w": spec, **OURS_TOO}, {"architecture": "Gemma3ForCausalLM"}
    layers = {"w": layer(8), "a": layer(), "b": layer()}
    assert specs_of(monkeypatch, specs, layers, **name) is specs
    with pytest.raises(ValueError, match="layer b of the model has recurrent state"):
        specs_of(monkeypatch, {**specs, "b": STATE}, layers, **name)


@pytest.mark.parametrize(
    ("specs", "layers", "message"),
    [
        ({"a": OURS}, {"a": layer()}, "has 1 layers with a cache, its configuration says 2"),
        (OURS_TOO, {"a": layer(), "b": layer(8)}, "layers with different heads"),
    ],
    ids=["a-layer-less", "other-heads"],
)
def test_layers_that_the_quota_does_not_count_on(
    monkeypatch: pytest.MonkeyPatch,
    specs: dict[str, KVCacheSpec],
    layers: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*start without --kv-policy"):
        specs_of(monkeypatch, specs, layers)
