"""`select` in Triton against sorted() and the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_select import SPECIAL, check_select, int32
from vllm_budgetkv.ops.reference.select import select as select_reference
from vllm_budgetkv.ops.select import select
from vllm_budgetkv.ops.triton import select as launcher


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("num_tiers", [1, 255])
def test_random_scores(monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_tiers: int) -> None:
    """Heads that keep some, all, none and that hold fewer; up to several tiles."""
    monkeypatch.setattr(launcher, "BLOCK_TOKENS", 64)
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (5, num_tokens)
    scores = torch.randn(shape, generator=generator)
    tiers = torch.randint(0, num_tiers, shape, generator=generator).to(torch.uint8)
    lens = int32([num_tokens, num_tokens, num_tokens // 2, 0, num_tokens])
    check_select(scores, tiers, lens, int32([num_tokens // 3, num_tokens + 5, 7, 3, -1]))


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_ties_and_special_scores(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    scores = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=count, max_size=count))
    tiers = data.draw(st.lists(st.sampled_from([0, 1, 255]), min_size=count, max_size=count))
    lens, budget = data.draw(st.integers(0, count)), data.draw(st.integers(-1, count + 1))
    tiers_tensor = torch.tensor([tiers], dtype=torch.uint8)
    check_select(torch.tensor([scores]), tiers_tensor, int32([lens]), int32([budget]))


def test_recency_breaks_ties_from_tile_to_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "BLOCK_TOKENS", 16)
    scores, tiers = torch.zeros(1, 100), torch.zeros(1, 100, dtype=torch.uint8)
    scores[0, ::3] = 1.0
    keep = select(scores, tiers, int32([90]), int32([12]))
    assert keep.nonzero()[:, 1].tolist() == list(range(54, 90, 3))
    keep = select(scores, tiers, int32([90]), int32([31]))
    assert keep.nonzero()[:, 1].tolist() == [*range(0, 88, 3), 89]


@pytest.mark.parametrize("budget", [0, 1, 2048, 4999, 5000])
def test_long_heads_of_many_ties(budget: int) -> None:
    """Several tiles of the usual size, few scores, neighbours in the last bit among them."""
    generator = torch.Generator().manual_seed(budget)
    levels = torch.tensor([0.5, 0.5 + 2**-24, 0.5 + 2**-23, -3.0, -3.0 - 2**-22])
    scores = levels[torch.randint(len(levels), (2, 5000), generator=generator)]
    tiers = torch.randint(0, 2, (2, 5000), generator=generator).to(torch.uint8)
    arguments = (scores, tiers, int32([5000, 4500]), int32([budget, budget]))
    keep = select(*arguments)
    assert torch.equal(keep, select_reference(*arguments))
    assert keep.sum(1).tolist() == [budget, min(budget, 4500)]


def test_strided_arguments() -> None:
    scores = torch.randn(17, 3, generator=torch.Generator().manual_seed(0)).t()
    tiers = torch.zeros(17, 3, dtype=torch.uint8).t()
    lens = torch.tensor([[17, 99], [4, 99], [9, 99]], dtype=torch.int32)[:, 0]
    check_select(scores, tiers, lens, int32([4, 4, 4]))
