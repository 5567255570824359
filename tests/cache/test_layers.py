"""A compaction in decode asks the policy once for all layers, where the policy takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cache.lab import Lab
from tests.cache.test_rehearsal import QUOTA, make_lab, serve
from tests.policy.test_compile import OperationCounter
from vllm_budgetkv.policy import HybridPolicy, Observation, Retention

if TYPE_CHECKING:
    from vllm_budgetkv.cache.probe.bank import Rotary
    from vllm_budgetkv.cache.requests import RequestState


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of dimensions of the positions that the policy is shown."""
    dims: list[int] = []
    retain = HybridPolicy.retain

    def watched(self: HybridPolicy, observation: Observation) -> Retention:
        dims.append(observation.positions.dim())
        return retain(self, observation)

    monkeypatch.setattr(HybridPolicy, "retain", watched)
    return dims


@pytest.mark.parametrize("options", [{}, {"force_class": "dynamic", "dynamic_unit_tokens": 4}])
def test_the_same_as_layer_by_layer(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    dims = watch(monkeypatch)
    at_once, at_once_lab = serve(lab := make_lab(**options)), lab
    assert set(dims) == {2, 3}, "chunks are compressed one layer at a time"
    num_calls = len(dims)

    monkeypatch.setattr(HybridPolicy, "takes_layers", False)
    one_by_one, lab = serve(lab := make_lab(**options)), lab
    assert len(dims) - num_calls > num_calls
    assert set(dims[num_calls:]) == {2}
    for found, expected in zip(at_once, one_by_one, strict=True):
        assert torch.equal(found, expected)
    for name in ("page_table", "lens", "num_free", "is_static", "is_retrieving"):
        pair = (getattr(each.cache.tables, name) for each in (at_once_lab, lab))
        assert torch.equal(*pair), name


def test_layers_with_embeddings_of_their_own() -> None:
    """Probes of layers that turn differently are turned one by one; the answer is the same."""
    shared, own = make_lab(), make_lab(kind=OwnEmbeddings)
    rotaries = own.cache.layers.probes.rotaries.values()
    assert len({id(rotary) for rotary in rotaries}) == QUOTA.num_layers
    for found, expected in zip(serve(own), serve(shared), strict=True):
        assert torch.equal(found, expected)


class OwnEmbeddings(Lab):
    """Every layer has an embedding of its own, though all turn alike."""

    def rotaries(self) -> dict[int, Rotary]:
        return {layer: replace(self.rotary) for layer in range(self.layers)}


def test_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each is a launch: `score` and `contrast` per layer, the rest once for all."""
    counts = []
    for at_once in (True, False):
        monkeypatch.setattr(HybridPolicy, "takes_layers", at_once)
        lab = make_lab()
        compress_all = lab.cache.layers.compressor.compress_all

        def counted(request: RequestState, compress_all: Any = compress_all) -> None:
            with OperationCounter() as counter:
                compress_all(request)
            counts[-1] = counter.count

        monkeypatch.setattr(
            type(lab.cache.layers.compressor), "compress_all", lambda self, r: counted(r)
        )
        counts.append(0)
        serve(lab)
        monkeypatch.undo()
    assert 0 < counts[0] <= 197 + 2 * QUOTA.num_layers
    assert counts[1] > 160 * QUOTA.num_layers
