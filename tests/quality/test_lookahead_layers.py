"""A look-ahead that only some layers use: which queries each layer asks with, and until when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benchmarks.quality import inside
from benchmarks.quality.inside import before_admission
from benchmarks.quality.lookahead_layers import PartialBank, parting
from vllm_budgetkv.cache.probe.bank import BankShape, ProbeBank

NUM_LAYERS = 3


def make_bank(num_tokens: int, first: float) -> ProbeBank:
    """The query of token t in layer l is `first` + 10 l + t."""
    bank = ProbeBank(BankShape(NUM_LAYERS, 1, 2, torch.float32, torch.device("cpu")), 8)
    write = bank.plan_write(list(range(num_tokens)))
    bank.write_positions(write, torch.arange(num_tokens))
    for layer in range(NUM_LAYERS):
        queries = first + 10.0 * layer + torch.arange(num_tokens)
        bank.write_queries(write, layer, queries.view(-1, 1, 1).expand(-1, 1, 2))
    return bank


@pytest.fixture
def seed() -> ProbeBank:
    return make_bank(4, 0.0)


@pytest.fixture
def template() -> ProbeBank:
    return make_bank(2, 500.0)


def asked(bank: ProbeBank, layer: int) -> list[float]:
    return bank.probe(layer, torch.tensor(9), None)[:, 0, 0].tolist()


def test_the_others_ask_with_the_template(seed: ProbeBank, template: ProbeBank) -> None:
    bank = PartialBank.of(seed, {1}, template)
    assert asked(bank, 0) == [500, 501]
    assert asked(bank, 1) == [10, 11, 12, 13]
    assert asked(bank, 2) == [520, 521]
    assert asked(seed, 0) == [0, 1, 2, 3], "the look-ahead's own bank is as it was"


def test_all_ask_alike_once_the_question_is_read(seed: ProbeBank, template: ProbeBank) -> None:
    bank = PartialBank.of(seed, {1}, template).copy()
    write = bank.plan_write([0])
    bank.write_positions(write, torch.tensor([4]))
    for layer in range(NUM_LAYERS):
        bank.write_queries(write, layer, torch.full((1, 1, 2), 99.0))
        assert asked(bank, layer) == [10.0 * layer + t for t in range(4)] + [99]


def test_seeds_are_parted_before_requests_take_them(
    seed: ProbeBank, template: ProbeBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = seed

    class Probes:
        seeds: ClassVar[dict[str, ProbeBank]] = {"a": first}

        def seed(self, request_id: str, bank: ProbeBank) -> None:
            self.seeds[request_id] = bank

    class Slots:
        taken: ClassVar[list[ProbeBank]] = []

        def follow(self, _: object) -> None:
            self.taken.append(probes.seeds["a"].copy())

    slots, probes = Slots(), Probes()
    cache = SimpleNamespace(slots=slots, layers=SimpleNamespace(probes=probes))
    monkeypatch.setattr(inside, "cache_of", lambda _: cache)
    with before_admission(SimpleNamespace(), parting((0,), template)):
        slots.follow(None)
        slots.follow(None)
    probes.seed("a", seed)
    slots.follow(None)
    assert [len(asked(bank, 1)) for bank in slots.taken] == [2, 2, 4]
    assert [len(asked(bank, 0)) for bank in slots.taken] == [4, 4, 4]
