"""The oracle: its seeds are the queries of the full run, and the compressed run asks with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.quality.inside import Prefill
from benchmarks.quality.lab import Setup
from benchmarks.quality.oracle import bank_of, question_banks
from tests.quality.job import PROBE_TOKENS


def test_a_bank_holds_the_queries_in_order() -> None:
    queries = torch.arange(2 * 3 * 2 * 4.0).view(2, 3, 2, 4)
    prefill = Prefill([4, 5, 9], torch.tensor([4, 5, 7]), queries, None, None)
    bank = bank_of(prefill, capacity=5)
    assert (bank.size, bank.capacity) == (3, 5)
    for layer in range(2):
        asked = bank.probe(layer, torch.tensor(20), None)
        assert torch.equal(asked, queries[layer])
    assert bank.positions[:3].tolist() == [4, 5, 7]


@pytest.mark.parametrize("policy", ["window", "snapkv", "streammem"])
def test_a_policy_that_does_not_ask_the_question_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="choose a policy whose probe_source is PromptText"):
        question_banks(Setup(model="none", budget={"policy": policy, "page_quota": 40}), [])


@pytest.mark.engine
@pytest.mark.parametrize("index", [0, 1])
def test_seeds_are_the_queries_of_the_full_run(looked_inside: dict[str, Any], index: int) -> None:
    """The engine with the full cache fills a bank of its own with the same queries."""
    bank, seed = looked_inside["full"]["end"][index]["bank"], first_probe(looked_inside, index)
    assert PROBE_TOKENS < bank["num_written"] <= bank["capacity"], "oldest first, none overwritten"
    last = slice(bank["num_written"] - PROBE_TOKENS, bank["num_written"])
    assert torch.equal(bank["positions"][last], seed["positions"])
    assert torch.equal(bank["queries"][:, last], seed["queries"])


@pytest.mark.engine
def test_the_two_questions_differ(looked_inside: dict[str, Any]) -> None:
    """Otherwise a seed of the wrong example would pass."""
    one, other = (first_probe(looked_inside, index)["queries"] for index in (0, 1))
    assert (one - other).abs().max() > 0.1


@pytest.mark.engine
def test_there_is_no_lookahead(looked_inside: dict[str, Any]) -> None:
    """Each prompt has its compressions and nothing before them has been scored."""
    compressions = sum(len(t["seen_tokens"]) for t in looked_inside["compressed"]["traces"])
    assert len(looked_inside["probes"]) == compressions > 2
    assert len(looked_inside["outcomes"]) == 2


def first_probe(looked_inside: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
    """What the bank held at the first compression of a prompt."""
    before = looked_inside["compressed"]["traces"][:index]
    return looked_inside["probes"][sum(len(trace["seen_tokens"]) for trace in before)]
