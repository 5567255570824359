"""Keys and values of 8 bits: the ledger, attention, policies and recall, without a model.

The labs compare every held token, bit by bit, with what its number is when rounded, and attention
with dense attention over those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.cache import test_recall, test_replay, test_scenarios, test_streaming
from tests.cache.client import Client
from tests.cache.lab import Lab
from tests.cache.scripted import BLOCKS, small_quota

if TYPE_CHECKING:
    from vllm_budgetkv.policy import Observation, Policy, Retention

# no powers of two, so that a unit that is left out or taken twice shows
UNITS = (0.37, 0.21)
POLICIES = ["hybrid", "window", "snapkv", "keydiff", "infinipot-v", "cords"]


class QuantisedLab(Lab):
    units = UNITS


class RecallLab(test_replay.FamilyLab):
    units = UNITS


class StreamingLab(test_streaming.AllLab):
    units = UNITS


@pytest.mark.parametrize("policy", POLICIES)
def test_random_scenarios(policy: str) -> None:
    for seed in range(8):
        lab = test_scenarios.make_lab(seed, policy, QuantisedLab)
        test_scenarios.play(lab, num_steps=30)
        test_scenarios.assert_empty(lab)


@pytest.mark.parametrize("name", ["cords", "infinipot-v", "hybrid"])
def test_policies_see_what_the_model_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they judge is in the units of the model, and differs from it by the rounding alone."""
    lab = QuantisedLab(name, small_quota(), pool_blocks=BLOCKS)
    kind, seen = type(lab.policy), []
    retain = kind.retain

    def watched(policy: Policy, observation: Observation) -> Retention:
        seen.append(observation)
        return retain(policy, observation)

    monkeypatch.setattr(kind, "retain", watched)
    client = Client("long", 300)
    while not seen:
        lab.step({client: lab.room(client)})
    (first, *_) = seen
    shadow = lab.shadow[client.request_id, 0]
    found = {"keys": first.keys, "values": first.values, "value_norms": first.value_norms}
    expected = {
        "keys": shadow[:, 0],
        "values": shadow[:, 1],
        "value_norms": shadow[:, 1].norm(dim=-1),
    }
    assert any(told is not None for told in found.values())
    for field, told in found.items():
        if told is not None:
            torch.testing.assert_close(told[0, : len(shadow)], expected[field][:, 0])


def test_random_scenarios_with_recall() -> None:
    checked = taken = 0
    for seed in range(12):
        lab = test_recall.make_lab(seed, RecallLab)
        test_scenarios.play(lab, num_steps=45)
        test_scenarios.assert_empty(lab)
        # its index is made of keys as they are stored
        assert set(lab.recaller.scales.values()) == {lab.head_size**-0.5 * UNITS[0]}
        checked += lab.num_checked
        taken += lab.num_taken
    assert checked > 50
    assert taken > 12


def test_random_scenarios_of_prompts_that_are_read_again() -> None:
    streamed = 0
    for seed in range(8):
        lab = test_recall.make_lab(seed, StreamingLab)
        test_scenarios.play(lab, num_steps=45)
        test_scenarios.assert_empty(lab)
        streamed += lab.num_streamed
    assert streamed > 800
