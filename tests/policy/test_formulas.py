"""Every formula of the hybrid policy against a loop over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.policy import naive
from tests.policy.factories import PAGE_TOKENS, Case, kept_indices
from vllm_budgetkv.policy import PolicyOptions, Retention, Tier, make_policy
from vllm_budgetkv.policy.budgets import allocate
from vllm_budgetkv.policy.classify import classify
from vllm_budgetkv.policy.importance import importance, pooled_attention
from vllm_budgetkv.policy.pins import Pins
from vllm_budgetkv.policy.text_prior import prior_text
from vllm_budgetkv.policy.units import keep_whole_units

CASES = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    num_heads=st.sampled_from([1, 2, 3, 8]),
    group=st.sampled_from([1, 2, 7]),
    seen_tokens=st.integers(40, 500),
    budget_tokens=st.integers(16, 300),
    max_head_tokens=st.sampled_from([64, 200, 10_000]),
    held_share=st.floats(0.2, 1.0),
    hints=st.booleans(),
)
repeatable = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("width", [1, 3, 5, 7, 9, 13])
def test_pool_stops_at_gaps_and_borders(width: int) -> None:
    observation = Case(held_share=0.85).observe()
    scores = pooled_attention(observation, width)
    assert scores.tolist() == naive.pool(observation, width)


def test_importance_is_lent_mass_times_value_norm() -> None:
    observation, reach = Case(seed=3).observe(), 2
    assert observation.value_norms is not None
    lent = importance(replace(observation, value_norms=None), reach)
    torch.testing.assert_close(importance(observation, reach), lent * observation.value_norms)
    assert observation.mass is not None and bool((lent > observation.mass).any())
    alone = importance(replace(observation, value_norms=None))
    assert torch.equal(alone, observation.mass)


def test_importance_without_a_probe() -> None:
    observation = replace(Case().observe(), mass=None)
    assert observation.value_norms is not None
    assert torch.equal(importance(observation, 2), observation.value_norms)
    recency = importance(replace(observation, value_norms=None))
    assert recency.tolist() == (observation.positions + 1).tolist()


@pytest.mark.parametrize(
    ("was_static", "expected"),
    [
        (None, [False, True, True, True, False]),
        ([False] * 5, [False, False, False, True, False]),
        ([True] * 5, [False, True, True, True, True]),
    ],
    ids=["first", "was-dynamic", "was-static"],
)
def test_classes_with_hysteresis(was_static: list[bool] | None, expected: list[bool]) -> None:
    """Two query heads per KV head; the less concentrated one decides."""
    topk_mass = torch.tensor([1.0, 0.84, 0.91, 1.0, 0.94, 0.949, 0.951, 0.96, 0.86, 0.99])
    previous = None if was_static is None else torch.tensor(was_static)
    observation = replace(Case(num_heads=5).observe(), topk_mass=topk_mass, was_static=previous)
    assert classify(observation, PolicyOptions()).tolist() == expected


@pytest.mark.parametrize("force", ["static", "dynamic"])
def test_forced_class_wins_over_the_measured_one(force: str) -> None:
    observation = Case().observe()
    classes = classify(observation, PolicyOptions(force_class=force))
    assert classes.tolist() == [force == "static"] * 4


@pytest.mark.parametrize("was_static", [None, [True, False, True, False]], ids=["first", "later"])
def test_class_without_a_probe(was_static: list[bool] | None) -> None:
    previous = None if was_static is None else torch.tensor(was_static)
    observation = replace(Case().observe(), mass=None, topk_mass=None, was_static=previous)
    assert classify(observation, PolicyOptions()).tolist() == (was_static or [False] * 4)


@repeatable
@given(
    case=CASES,
    static_heads=st.integers(0, 255),
    dynamic_weight=st.sampled_from([0.5, 1.0, 1.5, 4.0]),
    floor_ratio=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_budgets(case: Case, static_heads: int, dynamic_weight: float, floor_ratio: float) -> None:
    observation = case.observe()
    options = PolicyOptions(dynamic_weight=dynamic_weight, floor_ratio=floor_ratio)
    is_static = [bool(static_heads >> head & 1) for head in range(case.num_heads)]
    scores = importance(observation)
    tiers = Pins.of(observation, options).tiers(observation.positions)
    pinned = int(((tiers > Tier.SCORED) & torch.tensor(is_static)[:, None]).sum())
    weights = [1.0 if static else dynamic_weight for static in is_static]
    static_part = sum(is_static) / sum(weights) * case.budget_tokens * case.num_heads
    assume(pinned <= static_part)  # otherwise equal pins compete and any split is right
    answer = allocate(observation, scores, tiers, torch.tensor(is_static), options, PAGE_TOKENS)
    expected = naive.allocate(
        observation, scores.tolist(), tiers.tolist(), is_static, options, PAGE_TOKENS
    )
    assert answer.tolist() == expected
    assert answer.dtype == torch.int32


@repeatable
@given(case=CASES, caps=st.lists(st.integers(0, 120), min_size=8, max_size=8))
def test_text_prior(case: Case, caps: list[int]) -> None:
    observation = case.observe()
    scores = importance(observation)
    tiers = Pins.of(observation, PolicyOptions()).tiers(observation.positions)
    candidates = (tiers == Tier.SCORED) & ~observation.is_vision
    chosen = prior_text(observation, scores, candidates, torch.tensor(caps[: case.num_heads]))
    for head in range(case.num_heads):
        spans = observation.span_ids[head].tolist()
        mine = candidates[head].tolist()
        size = {s: sum(c and t == s for c, t in zip(mine, spans, strict=True)) for s in spans}
        if observation.span_tokens is not None:
            size = dict(enumerate(observation.span_tokens.tolist()))
        expected = naive.prior_text(scores[head].tolist(), spans, mine, size, caps[head])
        assert set(chosen[head].nonzero()[:, 0].tolist()) == expected


def test_text_spans_shrink_at_one_rate() -> None:
    """b_X / n_X is the same for every span, to within the one token that cannot be split."""
    observation = Case(seen_tokens=900, held_share=1.5).observe()
    candidates = (observation.positions >= 0) & ~observation.is_vision
    cap = int(candidates[0].sum()) // 3
    chosen = prior_text(observation, importance(observation), candidates, torch.full((4,), cap))
    assert chosen.sum(dim=1).tolist() == [cap] * 4
    for span in range(0, 7, 2):
        mine = candidates & (observation.span_ids == span)
        assert mine.any()
        kept, size = (chosen & mine).sum(dim=1), mine.sum(dim=1)
        assert ((kept - size * cap / candidates.sum(dim=1)).abs() <= 1).all()


def test_an_early_span_is_not_pruned_again_and_again() -> None:
    """The rate counts the prompt's tokens: what is left of a pruned span is not its whole."""
    case = Case(seen_tokens=900, held_share=1.5, num_heads=1)
    observation = case.observe()
    assert observation.span_tokens is not None
    is_text = ~observation.is_vision & (observation.positions >= 0)
    thinned = is_text & ((observation.span_ids != 0) | (observation.positions % 3 == 0))
    counts = [int((thinned & (observation.span_ids == span)).sum()) for span in (0, 2)]
    sizes = observation.span_tokens.tolist()
    assert counts[0] * 2 < sizes[0]
    cap = torch.tensor([int(thinned.sum()) // 2])
    chosen = prior_text(observation, importance(observation), thinned, cap)
    kept = [int((chosen & (observation.span_ids == span)).sum()) for span in (0, 2)]
    assert kept[0] == counts[0]
    assert kept[1] < counts[1]


@repeatable
@given(case=CASES, unit_tokens=st.sampled_from([2, 4, 16]), static_heads=st.integers(0, 255))
def test_whole_units(case: Case, unit_tokens: int, static_heads: int) -> None:
    observation = case.observe()
    tiers = Pins.of(observation, PolicyOptions()).tiers(observation.positions)
    is_static = torch.tensor([bool(static_heads >> h & 1) for h in range(case.num_heads)])
    budgets = observation.lens.clamp(max=case.budget_tokens)
    scores = importance(observation)
    token_wise = Retention(scores=scores, tiers=tiers, budgets=budgets, is_static=is_static)
    answer = keep_whole_units(token_wise, observation.positions, unit_tokens, case.seen_tokens)
    kept = kept_indices(answer, observation)
    kept_token_wise = kept_indices(token_wise, observation)
    assert torch.equal(answer.tiers == Tier.NOT_HELD, observation.positions < 0)
    for head in range(case.num_heads):
        rows = (tensor[head].tolist() for tensor in (scores, tiers, observation.positions))
        expected = naive.keep_units(*rows, unit_tokens, int(budgets[head]))
        if is_static[head]:
            assert kept[head] == kept_token_wise[head]
        elif expected:
            assert kept[head] == expected
        else:
            assert len(kept[head]) == budgets[head]


def test_a_budget_below_one_unit_does_not_empty_the_head() -> None:
    observation = Case(held_share=1.5, seen_tokens=704).observe()
    tiers = (observation.positions >= 0).to(torch.uint8)
    answer = keep_whole_units(
        Retention(
            scores=importance(observation),
            tiers=tiers,
            budgets=torch.tensor([15, 16, 17, 33], dtype=torch.int32),
            is_static=torch.zeros(4, dtype=torch.bool),
        ),
        observation.positions,
        16,
        observation.seen_tokens,
    )
    assert answer.budgets.tolist() == [15, 16, 16, 32]


def test_units_through_the_policy() -> None:
    """With the page as unit, a dynamic head holds whole pages of positions."""
    options = PolicyOptions(dynamic_unit_tokens=PAGE_TOKENS, force_class="dynamic")
    observation = Case(held_share=1.5, seen_tokens=640).observe()
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
    for head in kept_indices(retention, observation):
        assert len(head) == 96
        assert len({index // PAGE_TOKENS for index in head}) == 6


@pytest.mark.parametrize(
    ("reach", "lent"),
    [
        # text up to 19, a picture from 20 to 24, and text up to a gap behind 29
        (6, [*range(9, 30)]),
        (2, [13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 27, 28, 29]),
        (1, [14, 15, 16, 21, 22, 23, 28, 29]),
    ],
)
def test_attention_is_lent_to_what_stands_beside(reach: int, lent: list[int]) -> None:
    """Nearest first, but not from text to vision, nor over a gap."""
    positions = torch.arange(40).int()[None].clone()
    positions[:, 30:] += 5
    mass = torch.zeros(1, 40)
    mass[0, 15] = mass[0, 29] = mass[0, 22] = 0.5
    is_vision = torch.zeros(1, 40, dtype=torch.bool)
    is_vision[:, 20:25] = True
    spans = torch.cat((torch.zeros(20), torch.ones(5), torch.full((15,), 2.0))).int()[None]
    observation = replace(
        Case(seen_tokens=45, num_heads=1).observe(),
        mass=mass,
        value_norms=None,
        positions=positions,
        is_vision=is_vision,
        span_ids=spans,
    )
    scores = importance(observation, reach)[0]
    assert scores.nonzero().flatten().tolist() == lent
    assert scores[15] == scores[22] == 0.5
    assert scores[16] < 0.5 and scores[lent].min() > 0.49
