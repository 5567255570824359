"""A layer never writes zeros for a request, whatever metadata vLLM hands it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.worker.test_fields import batch, bound, implementation, plain
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder

LAYER: Any = SimpleNamespace(layer_name="attn")


def forward(impl: Any) -> torch.Tensor:
    tokens = torch.ones(3, 4, 32)
    return impl.forward(LAYER, tokens, tokens, tokens, torch.empty(0), None, torch.ones(3, 128))


@pytest.mark.parametrize("cache", [None, SimpleNamespace(plans={})], ids=["profiling", "dummy"])
def test_a_batch_of_no_request_gets_zeros(cache: Any) -> None:
    impl = implementation()
    impl.cache = cache
    assert not forward(impl).any()


def test_requests_without_metadata_are_an_error() -> None:
    """Zeros went on as if they were attention: half of a batch that ran as two."""
    impl = implementation()
    impl.cache = SimpleNamespace(plans={"a": None})
    with pytest.raises(RuntimeError, match="ran layer attn for 1 requests without the metadata"):
        forward(impl)


def test_a_builder_answers_nothing_before_there_is_a_cache() -> None:
    builder = bound()
    builder.vllm_config.compilation_config.static_forward_context["attn"].impl.cache = None
    builder.bind(None, lambda common: ())
    assert builder.build(0, batch()) is None
    assert builder.build_for_cudagraph_capture(batch()) is None


def test_a_builder_answers_nothing_for_a_batch_of_no_request() -> None:
    assert bound(plans=(), rows=()).build(0, batch()) is None


@pytest.mark.parametrize("method", ["build", "build_for_cudagraph_capture"])
def test_a_second_builder_is_an_error(method: str) -> None:
    """vLLM makes one for every part that a batch is split into; the worker binds the first."""
    first = bound()
    second = BudgetMetadataBuilder(plain(), ["attn"], first.vllm_config, torch.device("cpu"))
    arguments = (0, batch()) if method == "build" else (batch(),)
    with pytest.raises(RuntimeError, match="second metadata builder"):
        getattr(second, method)(*arguments)


@pytest.mark.parametrize("rows", [("a",), ("a", "b", "b")], ids=["half", "twice"])
def test_a_part_of_a_batch_is_an_error(rows: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="rows of a batch of 2 requests, which must run as one"):
        bound(rows=rows).build(0, batch())
