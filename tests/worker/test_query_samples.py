"""How the worker hears the queries of layers in a run that holds no request."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.sequence import IntermediateTensors

from tests.scheduler.engine_core import configure
from vllm_budgetkv.worker import query_samples
from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.query_samples import NUM_TOKEN_IDS, heard, sample_queries

if TYPE_CHECKING:
    from pathlib import Path


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


class Stage(torch.nn.Module):
    """A stage whose layer asks with what came from the stage before; with nothing if none does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.made = [layer], 0

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        self.made += 1
        names = ("hidden_states", "residual")
        zeros = (torch.zeros(batch_size, 128, dtype=dtype, device=device) for _ in names)
        return IntermediateTensors(dict(zip(names, zeros, strict=True)))

    def embed_input_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, None].expand(-1, 128).float()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> None:
        found = inputs_embeds
        if intermediate_tensors is not None:
            assert inputs_embeds is None
            found = sum(intermediate_tensors.tensors.values(), torch.zeros(1))
        assert found is not None
        (layer,) = self.layer
        rest = torch.randn(len(positions), 2, 32)
        out = torch.ones(len(positions), 128)
        layer.impl.forward(layer, found.view(-1, 4, 32), rest, rest, torch.empty(0), None, out)


@pytest.mark.parametrize("is_first", [True, False])
def test_each_stage_hears_one_token_at_every_position(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """A later stage has no token: zeros, which any rotation turns into themselves, are no query."""
    group = SimpleNamespace(is_first_rank=is_first)
    monkeypatch.setattr(query_samples, "get_pp_group", lambda: group)
    config = configure(qwen2)
    layer: Any = SimpleNamespace(layer_name="ours", impl=BudgetAttention(4, 32, 1.0, 2))
    config.compilation_config.static_forward_context["ours"] = layer
    model = Stage(layer)
    runner = SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        supports_mm_inputs=True,
        lora_config=None,
        maybe_dummy_run_with_lora=lambda *_: nullcontext(),
    )
    found = sample_queries(runner, config, [1, 5, 9, 1])["ours"]
    assert found.shape == (NUM_TOKEN_IDS, 4, 4, 32)
    assert model.made == (not is_first)
    assert found.abs().amax(dim=(1, 2, 3)).min() > 0
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert not torch.equal(found[0], found[1])
