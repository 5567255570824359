"""How the worker hears the queries of layers in a run that holds no request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase

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


class State(torch.nn.Module, MambaBase):
    """A recurrent layer that returns its output, or writes it, as vLLM's do: from memory that
    nobody has filled."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.returns = returns

    def forward(
        self, hidden: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        found = torch.full_like(hidden, torch.nan)
        if self.returns:
            return found
        assert output is not None
        output.copy_(found)
        return None

    get_state_shape = get_state_dtype = get_attn_backend = get_kv_cache_spec = None
    mamba_type = None


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("returns", [False, True])
def test_layers_with_state_are_silent_inside(returns: bool, by_name: bool) -> None:
    layer = State(returns=returns)
    context = SimpleNamespace(static_forward_context={"state": layer})
    config: Any = SimpleNamespace(compilation_config=context)
    hidden = torch.randn(3, 4)

    def run() -> torch.Tensor:
        if returns:
            return layer(hidden)
        out = torch.ones(3, 4)
        if by_name:
            layer(hidden, output=out)
        else:
            layer(hidden, out)
        return out

    with heard(config):
        assert not run().any()
    assert run().isnan().all()
