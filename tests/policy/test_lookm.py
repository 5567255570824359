"""LOOK-M: text before vision under a hard cap, attention as it is, and the way to merge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.policy.factories import PAGE_TOKENS, Case, kept_indices
from vllm_budgetkv.policy import Observation, PolicyOptions, make_policy

LOOKM = {
    "lookm": None,
    "lookm-average": "average",
    "lookm-pivot": "pivot",
    "lookm-weighted": "weighted",
}
WINDOW_TOKENS = 8


def observe(**changes: int) -> Observation:
    """Of a request whose last frame is whole, so that only sinks and the window are pinned."""
    case = Case(**{"held_share": 0.8, **changes})
    return replace(case.observe(), protected_position=case.seen_tokens)


def keep(observation: Observation, name: str = "lookm") -> list[list[int]]:
    options = PolicyOptions(sink_tokens=4, window_tokens=WINDOW_TOKENS)
    retention = make_policy(name, options, PAGE_TOKENS).retain(observation)
    return kept_indices(retention, observation)


def ranked(observation: Observation, head: int, *, vision: bool) -> list[int]:
    """Unpinned tokens of a head and modality, the most attended first."""
    assert observation.mass is not None
    positions = observation.positions[head, : observation.lens[head]].tolist()
    recent_start = observation.seen_tokens - WINDOW_TOKENS
    free = [i for i, position in enumerate(positions) if 4 <= position < recent_start]
    free = [i for i in free if bool(observation.is_vision[head, i]) == vision]
    mass = observation.mass[head].tolist()
    return sorted(free, key=lambda i: (mass[i], i), reverse=True)


def pinned(observation: Observation, head: int) -> set[int]:
    free = ranked(observation, head, vision=True) + ranked(observation, head, vision=False)
    return set(range(int(observation.lens[head]))) - set(free)


def test_all_text_stays_and_vision_fills_the_rest_by_attention() -> None:
    observation = observe(budget_tokens=320)
    for head, kept in enumerate(keep(observation)):
        text = ranked(observation, head, vision=False)
        vision = ranked(observation, head, vision=True)
        stay = pinned(observation, head) | set(text)
        assert len(stay) < len(kept) == 320
        assert set(kept) == stay | set(vision[: len(kept) - len(stay)])


def test_the_budget_is_a_cap_also_for_text() -> None:
    observation = observe(budget_tokens=60)
    for head, kept in enumerate(keep(observation)):
        stay, text = pinned(observation, head), ranked(observation, head, vision=False)
        assert len(kept) == 60 < len(stay) + len(text)
        assert set(kept) == stay | set(text[: 60 - len(stay)])


def test_no_head_is_longer_than_it_may_be() -> None:
    observation = observe(budget_tokens=320, max_head_tokens=48)
    assert [len(kept) for kept in keep(observation)] == [48] * 4


def test_value_norms_are_not_looked_at() -> None:
    observation = observe(budget_tokens=320)
    assert keep(observation) == keep(replace(observation, value_norms=None))


def test_without_a_probe_the_most_recent_text_stays() -> None:
    observation = observe(budget_tokens=60)
    for head, kept in enumerate(keep(replace(observation, mass=None, topk_mass=None))):
        stay, text = pinned(observation, head), ranked(observation, head, vision=False)
        assert set(kept) == stay | set(sorted(text)[len(stay) - 60 :])


@pytest.mark.parametrize("name", LOOKM)
def test_variants_differ_in_merging_alone(name: str) -> None:
    observation = observe(budget_tokens=100)
    retention = make_policy(name, PolicyOptions(), PAGE_TOKENS).retain(observation)
    plain = make_policy("lookm", PolicyOptions(), PAGE_TOKENS).retain(observation)
    assert retention.merge == LOOKM[name]
    for field in ("scores", "tiers", "budgets", "is_static"):
        assert torch.equal(getattr(retention, field), getattr(plain, field))


@pytest.mark.parametrize("unit_tokens", [1, 16])
@pytest.mark.parametrize(("option", "mode"), [("none", None), ("value", "value")])
def test_hybrid_merges_values_if_asked(option: str, mode: str | None, unit_tokens: int) -> None:
    options = PolicyOptions(merge=option, dynamic_unit_tokens=unit_tokens)
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observe())
    assert retention.merge == mode
