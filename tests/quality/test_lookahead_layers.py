"""A look-ahead that only some layers use: which queries each layer asks with, and until when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import lookahead_layers
from benchmarks.quality.lookahead_layers import PartialBank, only_in
from vllm_budgetkv.worker.bank import ProbeBank

NUM_LAYERS, SEED_TOKENS, TEMPLATE_TOKENS = 3, 4, 2


@pytest.fixture
def seed() -> ProbeBank:
    """A look-ahead's bank; the query of token t in layer l is 10 l + t."""
    bank = ProbeBank(NUM_LAYERS, 8, 1, 2, torch.float32, torch.device("cpu"))
    write = bank.plan_write(list(range(SEED_TOKENS)))
    bank.write_positions(write, torch.arange(SEED_TOKENS))
    for layer in range(NUM_LAYERS):
        queries = 10.0 * layer + torch.arange(SEED_TOKENS)
        bank.write_queries(write, layer, queries.view(-1, 1, 1).expand(-1, 1, 2))
    return bank


def asked(bank: ProbeBank, layer: int) -> list[float]:
    return bank.probe(layer, torch.tensor(9), None)[:, 0, 0].tolist()


def test_the_others_ask_with_the_template(seed: ProbeBank) -> None:
    bank = PartialBank.of(seed, {1}, TEMPLATE_TOKENS)
    assert asked(bank, 0) == [2, 3]
    assert asked(bank, 1) == [10, 11, 12, 13]
    assert asked(bank, 2) == [22, 23]
    assert asked(seed, 0) == [0, 1, 2, 3], "the look-ahead's own bank is as it was"


def test_all_ask_alike_once_the_question_is_read(seed: ProbeBank) -> None:
    bank = PartialBank.of(seed, {1}, TEMPLATE_TOKENS).copy()
    write = bank.plan_write([0])
    bank.write_positions(write, torch.tensor([4]))
    for layer in range(NUM_LAYERS):
        bank.write_queries(write, layer, torch.full((1, 1, 2), 99.0))
        assert asked(bank, layer) == [10.0 * layer + t for t in range(SEED_TOKENS)] + [99]


def test_seeds_are_parted_before_requests_take_them(
    seed: ProbeBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slots:
        def __init__(self) -> None:
            self.seeds = {"a": seed}
            self.taken: list[ProbeBank] = []

        def follow(self, _: object) -> None:
            self.taken.append(self.seeds["a"].copy())

    slots = Slots()
    monkeypatch.setattr(lookahead_layers, "cache_of", lambda _: SimpleNamespace(slots=slots))
    with only_in(SimpleNamespace(), (0,), TEMPLATE_TOKENS):
        slots.follow(None)
        slots.follow(None)
    slots.seeds["a"] = seed
    slots.follow(None)
    assert [len(asked(bank, 1)) for bank in slots.taken] == [2, 2, 4]
    assert [len(asked(bank, 0)) for bank in slots.taken] == [4, 4, 4]
