"""The coreset of `cords` against a greedy loop in double precision, and what it must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.factories import PAGE_TOKENS, Case, kept_indices
from vllm_budgetkv.policy import Observation, PolicyOptions, make_policy
from vllm_budgetkv.policy.cords import points_of
from vllm_budgetkv.policy.coreset import ROUNDS, Coreset, rank, unit_scale

repeatable = settings(max_examples=30, deadline=None, derandomize=True)
TOLERANCE = 1e-4


def gain(points: torch.Tensor, chosen: list[int], index: int, share: float) -> float:
    """Coverage and diversity of one point, float64, written out."""
    point = points[index]
    nearest = min(float((point - points[other]).square().sum()) for other in chosen)
    gram = torch.eye(points.shape[1], dtype=torch.float64)
    for other in chosen:
        gram += torch.outer(points[other], points[other])
    residual = float(point @ torch.linalg.inv(gram) @ point)
    return (1 - share) * nearest / 2 + share * residual


def random_points(seed: int, num_points: int, size: int) -> torch.Tensor:
    """float32 [2, n, D], of different density from place to place."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2, num_points, size, generator=generator)
    points *= torch.rand(2, num_points, 1, generator=generator) ** 2 + 0.1
    return unit_scale(points, torch.ones(2, num_points, dtype=torch.bool))


@repeatable
@given(
    seed=st.integers(0, 2**20),
    num_points=st.integers(20, 90),
    size=st.sampled_from([1, 3, 8]),
    count=st.integers(1, ROUNDS),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_rounds_of_one_point_are_the_greedy_choice(
    seed: int, num_points: int, size: int, count: int, share: float
) -> None:
    points = random_points(seed, num_points, size)
    is_held = torch.arange(num_points) < num_points - 3
    is_seed = torch.arange(num_points) < 2
    scores = rank(points, *(x.expand(2, -1) for x in (is_held, is_seed)), 5, count, share)
    for of_head, row in zip(points.double(), scores, strict=True):
        order = row.argsort(descending=True).tolist()
        assert sorted(order[:2]) == [0, 1] and not row[~is_held].any()
        for place in range(2, 2 + count):
            chosen = order[:place]
            others = [i for i in range(num_points - 3) if i not in chosen]
            best = max(gain(of_head, chosen, i, share) for i in others)
            assert gain(of_head, chosen, order[place], share) > best - TOLERANCE


@pytest.mark.parametrize("copies", [2, 7, 16])
def test_no_copy_before_the_last_point_is_covered(copies: int) -> None:
    """A round takes several points, and all copies of the farthest one are equally far."""
    generator = torch.Generator().manual_seed(copies)
    places = torch.randn(1, 60, 16, generator=generator)
    points = places.repeat(1, copies, 1)[:, torch.randperm(60 * copies, generator=generator)]
    all_held = torch.ones(points.shape[:2], dtype=torch.bool)
    points = unit_scale(points, all_held)
    seeds = torch.zeros_like(all_held)
    seeds[0, 0] = True
    kept = points[0, rank(points, all_held, seeds, 1, 59, 0.0)[0].topk(60).indices]
    assert len(kept.unique(dim=0)) == 60


def test_residuals_are_those_of_all_that_is_chosen() -> None:
    """They are updated round by round, and the errors of rounding must not add up."""
    points = random_points(5, 300, 24)
    held = torch.ones(2, 300, dtype=torch.bool)
    coreset = Coreset.empty(points, held, 0.5)
    for start in range(0, 200, 8):
        index = torch.arange(start, start + 8).expand(2, -1)
        coreset.add(index, index % 3 > 0)
    chosen = points[:, [i for i in range(200) if i % 3]].double()
    inverse = torch.linalg.inv(torch.eye(24) + chosen.mT @ chosen)
    expected = ((points.double() @ inverse) * points).sum(dim=-1)
    torch.testing.assert_close(coreset.residual.double(), expected, rtol=0, atol=1e-5)
    apart = torch.cdist(points.double(), chosen).square().amin(dim=-1)
    torch.testing.assert_close(coreset.nearest.double(), apart, rtol=0, atol=1e-4)
    assert coreset.is_open.sum(dim=-1).tolist() == [300 - len(chosen[0])] * 2


def lone(seen_tokens: int = 400, **tensors: torch.Tensor) -> Observation:
    """One head that holds all tokens, of which most are alike."""
    case = Case(num_heads=1, seen_tokens=seen_tokens, held_share=2.0, budget_tokens=60)
    observation = replace(case.observe(), protected_position=seen_tokens)
    assert observation.keys is not None and observation.values is not None
    changed = {"keys": observation.keys / 50, "values": observation.values / 50}
    return replace(observation, **changed | tensors)


@pytest.mark.parametrize(("value_share", "stays"), [(0.0, "keys"), (1.0, "values"), (0.5, "both")])
def test_what_is_unlike_in_keys_or_values_stays(value_share: float, stays: str) -> None:
    observation = lone()
    assert observation.keys is not None and observation.values is not None
    observation.keys[0, 100] += 3
    observation.values[0, 200] -= 3
    options = PolicyOptions(window_tokens=8, coverage_value_share=value_share)
    retention = make_policy("cords", options, PAGE_TOKENS).retain(observation)
    order = retention.scores[0, 5:-8].argsort(descending=True) + 5
    first = order[0].item(), order[1].item()
    assert {"keys": first[0] == 100, "values": first[0] == 200, "both": {*first} == {100, 200}}[
        stays
    ]


def test_what_a_pinned_token_covers_goes_first() -> None:
    """Copies of the last token, which the window keeps, are worth less than one of another."""
    observation = lone()
    assert observation.keys is not None and observation.values is not None
    for vectors in (observation.keys, observation.values):
        vectors[0, 50:150] = vectors[0, -1]
    options = PolicyOptions(window_tokens=8)
    retention = make_policy("cords", options, PAGE_TOKENS).retain(observation)
    (kept,) = kept_indices(retention, observation)
    assert len(kept) == 60 and not set(kept) & set(range(50, 150))


@pytest.mark.parametrize("value_share", [0.0, 0.25, 1.0])
def test_keys_and_values_count_by_their_share(value_share: float) -> None:
    """Whatever their units: the mean squared norm is 1, and the share of it are the values."""
    observation = Case(seed=1).observe()
    assert observation.keys is not None and observation.values is not None
    observation = replace(observation, keys=(observation.keys * 40).bfloat16())
    points = points_of(observation, value_share).double()
    held = observation.positions >= 0
    assert points.dtype == torch.float64 and not points[~held].any()
    for head in range(4):
        norms = points[head, held[head]].square()
        parts = norms.mean(dim=0).view(2, -1).sum(dim=-1)
        assert parts.tolist() == pytest.approx([1 - value_share, value_share], abs=1e-3)
