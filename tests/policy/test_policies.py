"""What every policy promises, on random requests."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.policy.factories import PAGE_TOKENS, Case, kept_indices, policy_for
from vllm_budgetkv.policy import (
    POLICIES,
    Observation,
    Policy,
    PolicyOptions,
    Retention,
    Tier,
    make_policy,
)
from vllm_budgetkv.policy.budgets import RATIO_UNIT
from vllm_budgetkv.policy.pins import Pins

CASES = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    num_heads=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([1, 4]),
    seen_tokens=st.integers(40, 900),
    budget_tokens=st.integers(16, 500),
    max_head_tokens=st.sampled_from([48, 160, 10_000]),
    held_share=st.floats(0.2, 1.2),
    hints=st.booleans(),
)
OPTIONS = st.builds(
    PolicyOptions,
    force_class=st.sampled_from([None, None, "static", "dynamic"]),
    dynamic_unit_tokens=st.sampled_from([1, 1, 4, 16]),
    text_share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    unlike_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dynamic_weight=st.sampled_from([0.5, 1.5, 3.0]),
    floor_ratio=st.floats(0, 1),
    window_tokens=st.integers(0, 100),
)
NAMES = [name for name, policy in POLICIES.items() if policy.compresses]
repeatable = settings(max_examples=80, deadline=None, derandomize=True)


def pinned_sets(
    observation: Observation, options: PolicyOptions, head: int
) -> tuple[set[int], set[int]]:
    """Indices of the sinks and of the recent window that the head holds."""
    pins = Pins.of(observation, options)
    positions = observation.positions[head, : observation.lens[head]].tolist()
    sinks = {i for i, position in enumerate(positions) if position < pins.sink_stop}
    recent = {i for i, position in enumerate(positions) if position >= pins.recent_start}
    return sinks, recent


@pytest.mark.parametrize("name", NAMES)
@repeatable
@given(case=CASES, options=OPTIONS)
def test_budgets_hold(name: str, case: Case, options: PolicyOptions) -> None:
    observation = case.observe()
    retention = policy_for(name, options, case.num_heads).retain(observation)
    budgets, lens = retention.budgets.tolist(), observation.lens.tolist()
    assert sum(budgets) <= case.budget_tokens * case.num_heads
    for budget, length in zip(budgets, lens, strict=True):
        assert 0 < budget <= min(length, case.max_head_tokens)
    if sum(lens) <= case.budget_tokens * case.num_heads and name == "hybrid":
        for budget, length in zip(budgets, lens, strict=True):
            cut = length > case.max_head_tokens  # then a dynamic head may end within a unit
            spare = options.dynamic_unit_tokens - 1 if cut else 0
            assert budget >= min(length, case.max_head_tokens) - spare


@pytest.mark.parametrize("name", NAMES)
@repeatable
@given(case=CASES, options=OPTIONS)
def test_sinks_and_recent_tokens_stay(name: str, case: Case, options: PolicyOptions) -> None:
    """Whenever the head's budget has room for them; a smaller budget has nothing else."""
    observation = case.observe()
    retention = policy_for(name, options, case.num_heads).retain(observation)
    for head, kept in enumerate(kept_indices(retention, observation)):
        sinks, recent = pinned_sets(observation, options, head)
        if len(sinks | recent) + 2 * options.dynamic_unit_tokens <= len(kept):
            assert sinks | recent <= set(kept)
        elif options.dynamic_unit_tokens == 1:
            assert sinks <= set(kept) or set(kept) <= sinks | recent


@pytest.mark.parametrize("num_static", [1, 3, 7])
def test_pins_beyond_the_static_share_do_not_break_the_budget(num_static: int) -> None:
    """A cut frame pins more on static heads than they get; dynamic heads must not pay for it."""
    case = Case(num_heads=8, group=1, budget_tokens=200, held_share=1.5)
    topk_mass = (torch.arange(8) < num_static).float()
    observation = replace(case.observe(), topk_mass=topk_mass, was_static=None)
    observation = replace(observation, protected_position=case.seen_tokens - 150)
    options = PolicyOptions(dynamic_weight=4.0)
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
    share = 8 * 200 * 4 // (num_static + 4 * (8 - num_static))
    share -= share % PAGE_TOKENS
    assert int(retention.budgets.sum()) <= 8 * 200
    assert retention.budgets[num_static:].tolist() == [share] * (8 - num_static)


@repeatable
@given(case=CASES, options=OPTIONS)
def test_text_cap_holds(case: Case, options: PolicyOptions) -> None:
    observation = case.observe()
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
    text = (retention.tiers == Tier.TEXT).sum(dim=1)
    assert (text <= retention.budgets * options.text_share + 1e-3).all()
    assert (text[~retention.is_static] == 0).all()
    assert not ((retention.tiers == Tier.TEXT) & observation.is_vision).any()


@repeatable
@given(case=CASES)
def test_dynamic_heads_hold_whole_pages(case: Case) -> None:
    """Unless a head keeps all it may, or the budget is below a page."""
    observation = case.observe()
    retention = make_policy("hybrid", PolicyOptions(), PAGE_TOKENS).retain(observation)
    caps = observation.lens.clamp(max=case.max_head_tokens)
    partial = retention.budgets % PAGE_TOKENS != 0
    small = retention.budgets < PAGE_TOKENS
    assert (~partial | retention.is_static | (retention.budgets == caps) | small).all()


@repeatable
@given(case=CASES, options=OPTIONS)
def test_the_most_unlike_stay_up_to_their_share(case: Case, options: PolicyOptions) -> None:
    """Of the tokens that nothing else raises, those whose keys differ most, as many as may."""
    observation = case.observe()
    options = replace(options, dynamic_unit_tokens=1)
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
    contrast = observation.contrast
    assert contrast is not None
    for head, tiers in enumerate(retention.tiers):
        unlike, scored = tiers == Tier.UNLIKE, tiers == Tier.SCORED
        room = max(int(retention.budgets[head]) - int((tiers > Tier.UNLIKE).sum()), 0)
        share = room * round(options.unlike_share * RATIO_UNIT) // RATIO_UNIT
        asked = observation.mass is not None and not observation.fits
        assert int(unlike.sum()) == min(share * asked, int((unlike | scored).sum()))
        if unlike.any() and scored.any():
            assert contrast[head, unlike].min() >= contrast[head, scored].max()


@pytest.mark.parametrize(("unlike_share", "stays"), [(0.0, False), (0.25, True)])
def test_what_no_question_looks_at_may_stay(unlike_share: float, stays: bool) -> None:
    """A token without attention whose key points away from all others: an answer may need it."""
    case = Case(held_share=2.0, num_heads=2)
    observation = case.observe()
    assert observation.contrast is not None and observation.mass is not None
    index = int((observation.is_vision[0] & observation.is_vision[1]).nonzero()[3])
    contrast = torch.zeros_like(observation.contrast)
    contrast[:, index] = 2.0
    mass = observation.mass.clone()
    mass[:, index] = 0.0
    observation = replace(observation, contrast=contrast, mass=mass)
    options = PolicyOptions(unlike_share=unlike_share, reach_tokens=0)
    retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
    assert all((index in kept) == stays for kept in kept_indices(retention, observation))


def test_text_is_preferred_up_to_its_share_on_static_heads_only() -> None:
    """Vision has all the mass, so only the prior can keep text: half of the budget if it may."""
    observation = Case(seen_tokens=900, held_share=1.5, budget_tokens=80).observe()
    mass = observation.is_vision.float() + 1e-6
    observation = replace(observation, mass=mass)
    for force in ("static", "dynamic"):
        pins = {"window_tokens": 0, "frame_share": 0, "sink_tokens": 0}
        options = PolicyOptions(force_class=force, unlike_share=0, text_share=0.5, **pins)
        retention = make_policy("hybrid", options, PAGE_TOKENS).retain(observation)
        kept = kept_indices(retention, observation)
        kept_text = [
            sum(not observation.is_vision[head, i] for i in indices)
            for head, indices in enumerate(kept)
        ]
        assert 4 * 80 - 4 <= sum(map(len, kept)) <= 4 * 80
        expected = [len(indices) // 2 if force == "static" else 0 for indices in kept]
        assert kept_text == expected


def test_frame_that_the_chunk_cuts_stays_but_not_at_any_price() -> None:
    spans = Case(seen_tokens=900, frame_tokens=90).spans()
    start = spans.items[0].offset
    case = Case(seen_tokens=start + 90 + 35, budget_tokens=100, held_share=1.5, num_heads=2)
    for protected, stay in ((start + 90, 35), (start, 50)):
        observation = replace(case.observe(), protected_position=protected)
        mass = (observation.positions < start).float()
        observation = replace(observation, mass=mass, value_norms=None)
        retention = make_policy("hybrid", PolicyOptions(), PAGE_TOKENS).retain(observation)
        for head, kept in enumerate(kept_indices(retention, observation)):
            tail = {i for i in kept if observation.positions[head, i] >= case.seen_tokens - stay}
            assert len(tail) == stay


@pytest.mark.parametrize("force", ["static", "dynamic"])
@pytest.mark.parametrize("unit_tokens", [1, 16])
@pytest.mark.parametrize("needle", [37, 300, 511])
def test_needle_survives_20_chunks(force: str, unit_tokens: int, needle: int) -> None:
    options = PolicyOptions(force_class=force, dynamic_unit_tokens=unit_tokens)
    assert needle in stream("hybrid", options, needle)


def test_needle_is_lost_without_scores() -> None:
    """The control: the stream is long enough to lose what nobody looks at."""
    assert 300 not in stream("window", PolicyOptions(), 300)


def stream(name: str, options: PolicyOptions, needle: int) -> set[int]:
    """Positions that all heads still hold after 20 rounds of chunk and retain."""
    policy = make_policy(name, options, PAGE_TOKENS)
    generator = torch.Generator().manual_seed(needle)
    num_heads, chunk_tokens = 2, 256
    budget_tokens = 64 if options.dynamic_unit_tokens == 1 else 128
    held = [torch.zeros(0, dtype=torch.int32) for _ in range(num_heads)]
    spans = Case(seen_tokens=20 * chunk_tokens).spans()
    contrast = 2 * torch.rand(20 * chunk_tokens, generator=generator)
    for seen in range(chunk_tokens, 21 * chunk_tokens, chunk_tokens):
        chunk = torch.arange(seen - chunk_tokens, seen, dtype=torch.int32)
        held = [torch.cat((positions, chunk)) for positions in held]
        lens = torch.tensor([len(positions) for positions in held], dtype=torch.int32)
        positions = torch.nn.utils.rnn.pad_sequence(held, batch_first=True, padding_value=-1)
        mass = torch.rand(positions.shape, generator=generator) * 0.01
        mass = torch.where(positions == needle, 0.5, mass) * (positions >= 0)
        span_ids, is_vision = spans.lookup(positions)
        observation = Observation(
            mass=mass,
            topk_mass=torch.full((num_heads,), 0.9),
            value_norms=torch.ones_like(mass),
            positions=positions,
            lens=lens,
            is_vision=is_vision,
            span_ids=span_ids,
            seen_tokens=seen,
            protected_position=spans.trailing_frame_start(seen),
            budget_tokens=budget_tokens,
            max_head_tokens=10_000,
            contrast=contrast[positions] * (positions >= 0),
        )
        kept = kept_indices(policy.retain(observation), observation)
        held = [positions[head, indices] for head, indices in enumerate(kept)]
        assert sum(map(len, held)) <= num_heads * budget_tokens
    return set.intersection(*(set(positions.tolist()) for positions in held))


@pytest.mark.parametrize("unit_tokens", [1, 16])
@pytest.mark.parametrize("hints", [True, False], ids=["hints", "no-hints"])
@pytest.mark.parametrize("name", NAMES)
def test_never_waits_for_the_device(name: str, hints: bool, unit_tokens: int) -> None:
    """Fake tensors have no data: reading one on the host, or a shape that depends on it, raises."""
    options = PolicyOptions(dynamic_unit_tokens=unit_tokens)
    policy = policy_for(name, options, Case.num_heads)
    observation = Case(hints=hints).observe()
    with FakeTensorMode() as mode:
        faked = {
            field.name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for field in fields(observation)
            for value in [getattr(observation, field.name)]
        }
        check_types(policy.retain(Observation(**faked)), observation)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_never_synchronises_a_gpu(name: str) -> None:
    policy = policy_for(name, PolicyOptions(dynamic_unit_tokens=4), Case.num_heads)
    observation = Case().observe()
    moved = {
        field.name: value.cuda() if isinstance(value, torch.Tensor) else value
        for field in fields(observation)
        for value in [getattr(observation, field.name)]
    }
    torch.cuda.set_sync_debug_mode("error")
    try:
        retention = policy.retain(Observation(**moved))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = policy.retain(observation)
    assert retention.budgets.tolist() == expected.budgets.tolist()
    assert torch.equal(retention.tiers.cpu(), expected.tiers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [Case(), Case(budget_tokens=5000), Case(num_heads=1, group=1), Case(seen_tokens=40)],
    ids=["tight", "fits", "one-head", "short"],
)
def test_types_and_nothing_mutated(name: str, case: Case) -> None:
    observation = case.observe()
    tensors = [v for v in vars(observation).values() if isinstance(v, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    policy = policy_for(name, PolicyOptions(), case.num_heads)
    check_types(policy.retain(observation), observation)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def check_types(retention: Retention, observation: Observation) -> None:
    per_token, per_head = observation.positions.shape, observation.lens.shape
    answer = [retention.scores, retention.tiers, retention.budgets, retention.is_static]
    assert [tensor.shape for tensor in answer] == [per_token, per_token, per_head, per_head]
    types = [torch.float32, torch.uint8, torch.int32, torch.bool]
    assert [tensor.dtype for tensor in answer] == types


def test_window_keeps_sinks_and_the_most_recent() -> None:
    observation = Case(held_share=1.5, budget_tokens=40).observe()
    retention = make_policy("window", PolicyOptions(), PAGE_TOKENS).retain(observation)
    expected = [0, 1, 2, 3, *range(700 - 36, 700)]
    assert kept_indices(retention, observation) == [expected] * 4


def test_full_is_never_asked() -> None:
    policy: Policy = make_policy("full", PolicyOptions(), PAGE_TOKENS)
    assert not policy.compresses
    with pytest.raises(RuntimeError, match="compresses"):
        policy.retain(Case().observe())


def test_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'h2o'; choose one of full, window, hybrid, "):
        make_policy("h2o", PolicyOptions(), PAGE_TOKENS)


def test_names_match_the_registry() -> None:
    assert {name: policy.name for name, policy in POLICIES.items()} == {n: n for n in POLICIES}


def test_text_alone_has_no_tier_of_its_own() -> None:
    """Being text is no reason to stay where nothing is vision: the best scores stay."""
    observation = Case(seen_tokens=900, held_share=1.5, budget_tokens=80).observe()
    observation = replace(observation, is_vision=torch.zeros_like(observation.is_vision))
    options = PolicyOptions(force_class="static", unlike_share=0)
    kept = [
        kept_indices(
            make_policy("hybrid", replace(options, text_share=share), PAGE_TOKENS).retain(
                observation
            ),
            observation,
        )
        for share in (0.0, 1.0)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("budget_tokens", "reach"), [(24, 1), (80, 5), (800, 8)])
def test_a_reach_leaves_room_in_a_small_budget(budget_tokens: int, reach: int) -> None:
    """Of one attended token: a sixteenth of the budget on either side."""
    observation = Case(seen_tokens=900, num_heads=1).observe()
    index = torch.arange(observation.shape[1])[None]
    observation = replace(
        observation,
        is_vision=torch.zeros_like(observation.is_vision),
        positions=index.int(),
        lens=torch.tensor([index.shape[1]], dtype=torch.int32),
        span_ids=torch.zeros_like(index, dtype=torch.int32),
        span_tokens=None,
        mass=(index == 400).float(),
        value_norms=None,
        budget_tokens=budget_tokens,
    )
    scores = make_policy("hybrid", PolicyOptions(), PAGE_TOKENS).retain(observation).scores[0]
    assert scores.nonzero().flatten().tolist() == list(range(400 - reach, 401 + reach))
