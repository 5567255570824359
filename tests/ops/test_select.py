"""`select`: the reference against sorted(), the kernel against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_budgetkv.ops.reference.select import select as select_reference
from vllm_budgetkv.ops.select import MAX_SELECT_TOKENS, select

SIZES = (0, 1, 15, 16, 17, 1000)
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, math.inf, -math.inf, math.nan)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def naive_keep(
    scores: torch.Tensor, tiers: torch.Tensor, num_tokens: int, budget: int
) -> list[bool]:
    def rank(index: int) -> tuple[int, float, int]:
        score = scores[index].item()
        return tiers[index].item(), -math.inf if math.isnan(score) else score, index

    best = sorted(range(num_tokens), key=rank, reverse=True)[: max(budget, 0)]
    return [index in best for index in range(len(scores))]


def check_select(
    scores: torch.Tensor, tiers: torch.Tensor, lens: torch.Tensor, budgets: torch.Tensor
) -> None:
    heads = zip(scores, tiers, lens.tolist(), budgets.tolist(), strict=True)
    expected = torch.tensor([naive_keep(*head) for head in heads], dtype=torch.bool)
    expected = expected.view(scores.shape)
    assert torch.equal(select_reference(scores, tiers, lens, budgets), expected)
    assert torch.equal(select(scores, tiers, lens, budgets), expected)


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("num_tiers", [1, 3, 255])
def test_random_scores(num_tokens: int, num_tiers: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (4, num_tokens)
    scores = torch.randn(shape, generator=generator)
    tiers = torch.randint(0, num_tiers, shape, generator=generator).to(torch.uint8)
    lens = int32([num_tokens, num_tokens, num_tokens // 2, 0])
    check_select(scores, tiers, lens, int32([num_tokens // 3, num_tokens + 5, 7, 3]))


@given(st.data())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_ties_and_special_scores(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    scores = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=count, max_size=count))
    tiers = data.draw(st.lists(st.sampled_from([0, 1, 255]), min_size=count, max_size=count))
    num_tokens = data.draw(st.integers(0, count))
    budget = data.draw(st.integers(-1, count + 1))
    check_select(
        torch.tensor([scores]),
        torch.tensor([tiers], dtype=torch.uint8),
        int32([num_tokens]),
        int32([budget]),
    )


def test_tiny_differences_order_within_a_high_tier() -> None:
    """A bias added for the tier would swallow these scores: in float16 they would all tie."""
    steps = torch.arange(1.0, 33.0)
    scores = (1e-7 * steps)[torch.randperm(32, generator=torch.Generator().manual_seed(0))][None]
    tiers = torch.tensor([[1] * 31 + [0]], dtype=torch.uint8)
    scores[0, 31] = 1.0
    keep = select(scores, tiers, int32([32]), int32([5]))
    assert keep[0, :31].nonzero().flatten().tolist() == sorted(
        scores[0, :31].topk(5).indices.tolist()
    )
    assert not keep[0, 31]


def test_recency_breaks_ties() -> None:
    scores, tiers = torch.zeros(1, 10), torch.zeros(1, 10, dtype=torch.uint8)
    keep = select(scores, tiers, int32([8]), int32([3]))
    assert keep.nonzero()[:, 1].tolist() == [5, 6, 7]


def test_strided_arguments() -> None:
    scores = torch.randn(17, 3, generator=torch.Generator().manual_seed(0)).t()
    tiers = torch.zeros(17, 3, dtype=torch.uint8).t()
    lens = torch.tensor([[17, 99], [4, 99], [9, 99]], dtype=torch.int32)[:, 0]
    check_select(scores, tiers, lens, int32([4, 4, 4]))


def test_wrong_arguments_are_refused() -> None:
    scores, tiers = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tiers is torch.bool .* pass torch.uint8 \[2, 4\]"):
        select(scores, tiers.bool(), int32([4, 4]), int32([1, 1]))
    with pytest.raises(ValueError, match="budgets is"):
        select(scores, tiers, int32([4, 4]), int32([1]))
    with pytest.raises(ValueError, match="holds 5 tokens but scores cover 4"):
        select(scores, tiers, int32([4, 5]), int32([1, 1]))
    too_many = torch.zeros(1).expand(1, MAX_SELECT_TOKENS + 1)
    with pytest.raises(ValueError, match="at most 16777216"):
        select(too_many, torch.zeros(1, dtype=torch.uint8).expand_as(too_many), *[int32([1])] * 2)
