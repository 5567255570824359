"""How the worker hears the queries of layers in a run that holds no request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.query_samples import heard


def test_our_layers_alone_are_heard_and_only_inside() -> None:
    """Layers of other kinds stand in the same context, some with an implementation of vLLM's."""
    ours: Any = SimpleNamespace(layer_name="ours", impl=BudgetAttention(4, 32, 1.0, 2))
    others = {"state": SimpleNamespace(), "other": SimpleNamespace(impl=SimpleNamespace())}
    context = SimpleNamespace(static_forward_context={"ours": ours, **others})
    config: Any = SimpleNamespace(compilation_config=context)
    query, rest = torch.randn(3, 4, 32), torch.randn(3, 2, 32)

    def run() -> torch.Tensor:
        out = torch.ones(3, 128)
        return ours.impl.forward(ours, query, rest, rest, torch.empty(0), None, out)

    with heard(config) as listener:
        assert not run().any()
    assert torch.equal(listener.queries["ours"], query)
    query = query + 1.0
    run()
    assert not torch.equal(listener.queries["ours"], query)
