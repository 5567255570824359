"""A policy that takes several layers at once answers as for each of them alone, bit for bit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.policy.factories import Case, policy_for
from vllm_budgetkv.policy import POLICIES, Observation, PolicyOptions

SEEDS = (2, 3, 4, 5)
# those that say so of all layers, and those that `hybrid` does not read
SHARED = {"span_tokens", "keys", "values", "frame_ids", "patch_ids"}
NAMES = sorted(name for name, policy in POLICIES.items() if policy.takes_layers)


def layers_of(**changes: Any) -> list[Observation]:
    """One observation per seed, padded to the longest."""
    seen = [replace(Case(seed=seed).observe(), keys=None, values=None, **changes) for seed in SEEDS]
    width = max(observation.shape[1] for observation in seen)
    return [padded(observation, width) for observation in seen]


def padded(observation: Observation, width: int) -> Observation:
    grown = {}
    for field in fields(observation):
        value = getattr(observation, field.name)
        if isinstance(value, torch.Tensor) and value.shape == observation.shape:
            missing = torch.zeros(len(value), width - value.shape[1], dtype=value.dtype)
            fill = missing - 1 if field.name == "positions" else missing
            grown[field.name] = torch.cat((value, fill), dim=1)
    return replace(observation, **grown)


def stacked(seen: list[Observation]) -> Observation:
    found = {}
    for field in fields(Observation):
        values = [getattr(observation, field.name) for observation in seen]
        if isinstance(values[0], torch.Tensor) and field.name not in SHARED:
            found[field.name] = torch.stack(values)
    return replace(seen[0], **found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"was_static": None},
        {"mass": None, "topk_mass": None},
        {"text_tokens": None, "span_tokens": None},
        {"text_tokens": 0},
        {"budget_tokens": 10_000},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dynamic_unit_tokens": 4, "static_threshold": 0.9},
        {"force_class": "dynamic", "dynamic_unit_tokens": 2},
        {"force_class": "static"},
        {"reach_tokens": 3, "merge": "value"},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
@pytest.mark.parametrize("name", NAMES)
def test_as_for_each_layer_alone(name: str, options: dict[str, Any], changes: Any) -> None:
    policy = policy_for(name, PolicyOptions(**options), Case.num_heads)
    seen = layers_of(**changes)
    at_once = policy.retain(stacked(seen))
    for layer, observation in enumerate(seen):
        alone = policy.retain(observation)
        assert at_once.merge == alone.merge
        for field in ("scores", "tiers", "budgets", "is_static"):
            assert torch.equal(getattr(at_once, field)[layer], getattr(alone, field)), field


def test_hybrid_takes_layers() -> None:
    assert NAMES == ["hybrid"]
