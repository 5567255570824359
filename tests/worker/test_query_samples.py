"""What stands in for a step while the worker looks at how queries turn."""

from __future__ import annotations

import inspect

from vllm_budgetkv.cache.step import Step
from vllm_budgetkv.worker.query_samples import Listener


def test_a_layer_calls_it_as_it_calls_a_step() -> None:
    """A layer is handed either; with another signature no model that turns queries could start."""
    assert inspect.signature(Listener.run_layer) == inspect.signature(Step.run_layer)
