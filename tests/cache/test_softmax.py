"""Layers whose logits have a soft cap, or learned sinks beside them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from tests.cache import lab
from tests.cache.lab import Lab
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.cache.build import Model

if TYPE_CHECKING:
    from vllm_budgetkv.cache.step import Layers

QUOTA = Quota(blocks=12, page_tokens=8, num_layers=3, chunk_tokens=24, decode_interval_tokens=8)
SHARES = {"slots_share": 0.25, "max_index_share": 0.5}
SCALE, SINKS = 32**-0.5, torch.linspace(-1, 2, 4, dtype=torch.bfloat16)


def layers_of(monkeypatch: pytest.MonkeyPatch, made: type[Lab], quota: Quota) -> Layers:
    """What the layers work with of a model whose second layer has a cap, its third both."""
    special = partial(Model, soft_caps={1: 5.0, 2: 7.0}, sinks={2: SINKS})
    monkeypatch.setattr(lab, "Model", special)
    return made("snapkv", quota, pool_blocks=30).cache.layers


def test_attention_and_scores_have_what_their_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(monkeypatch, Lab, QUOTA)
    for scales in (layers.reader.scales, layers.compressor.scales):
        assert scales[0] == SCALE
        assert scales[1] == ops.Softmax(SCALE, 5.0, None)
        both = ops.Softmax.of(scales[2])
        assert (both.scale, both.soft_cap) == (SCALE, 7.0)
        assert both.sinks is not None and both.sinks.dtype == torch.float32
        assert torch.equal(both.sinks, SINKS.float())


class HostLab(Lab):
    """A lab with host memory."""

    def host_memory(self) -> dict[str, int]:
        return {"max_model_tokens": 400, "host_blocks": 60}


def test_nothing_comes_back_there(monkeypatch: pytest.MonkeyPatch) -> None:
    recall = Recall(num_heads=2, all_heads=6, page_words=512, code_words=1, **SHARES)
    quota = Quota(**{**vars(QUOTA), "recall": recall, "blocks": 40})
    with pytest.raises(ValueError, match="or learned attention sinks: remove --kv-host-memory"):
        layers_of(monkeypatch, HostLab, quota)
