"""Policies can be compiled: nothing breaks their graph, and one graph serves requests alike.

On a GPU every torch operation is a launch; a compiler fuses most of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.policy.factories import Case, policy_for
from vllm_budgetkv.policy import POLICIES, Observation, PolicyOptions, Retention

NAMES = sorted(name for name, policy in POLICIES.items() if policy.compresses)
NUM_LAYERS = 4
# most operations of `hybrid` on one layer and chunk, of which docs/performance.md tells
MAX_HYBRID_OPERATIONS = 160


def observe(seed: int, **changes: Any) -> Observation:
    return replace(Case(seed=seed, layer=seed % NUM_LAYERS).observe(), **changes)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_all_chunks(name: str) -> None:
    """Sizes, budgets, positions and layers differ from call to call.

    `sparsemm` alone has a graph per layer: its head scores are numbers of the program.
    """
    torch._dynamo.reset()
    policy = policy_for(name, PolicyOptions(), Case.num_heads, NUM_LAYERS)
    counter = CompileCounter()
    retain = torch.compile(policy.retain, backend=counter, fullgraph=True, dynamic=True)
    # every 0 and 1, layers too, may have a graph of its own
    for seed in (2, 3, 6):
        check_same(retain(observe(seed)), policy.retain(observe(seed)))
    assert counter.frame_count == (2 if name == "sparsemm" else 1)
    first = observe(3, was_static=None)
    check_same(retain(first), policy.retain(first))


def check_same(actual: Retention, expected: Retention) -> None:
    for name, wanted in vars(expected).items():
        found = getattr(actual, name)
        same = torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
        assert same, name


def test_hybrid_does_not_grow() -> None:
    policy = policy_for("hybrid", PolicyOptions(), Case.num_heads)
    observation = observe(2)
    with OperationCounter() as counter:
        policy.retain(observation)
    assert 50 < counter.count <= MAX_HYBRID_OPERATIONS


class OperationCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that compute something: no views, no allocations."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        is_view = returned is not None and not returned.is_write
        self.count += not is_view and "empty" not in func._schema.name
        return func(*args, **(kwargs or {}))
