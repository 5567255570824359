"""The methods of the literature against loops in double precision."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy import naive
from tests.policy.factories import PAGE_TOKENS, Case, kept_indices, policy_for
from vllm_budgetkv.policy import PolicyOptions, Tier, make_policy
from vllm_budgetkv.policy.importance import average_runs, run_index
from vllm_budgetkv.policy.infinipot_v import novelty, ranks, recent_frames
from vllm_budgetkv.policy.random_ranks import mix
from vllm_budgetkv.policy.sparsemm import head_shares

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_budgetkv.policy import Observation

CASES = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    num_heads=st.sampled_from([1, 2, 4]),
    seen_tokens=st.integers(60, 400),
    budget_tokens=st.integers(32, 200),
    held_share=st.floats(0.4, 1.2),
    frame_tokens=st.sampled_from([3, 12, 20]),
)
repeatable = settings(max_examples=30, deadline=None, derandomize=True)
OPTIONS = PolicyOptions(window_tokens=8, probe_tokens=4)


def held_of(observation: Observation, values: torch.Tensor) -> list[list[float]]:
    """The values of the held tokens of every head."""
    lens = observation.lens.tolist()
    return [row[:count].tolist() for row, count in zip(values, lens, strict=True)]


# --- random ------------------------------------------------------------------------------------


def test_a_lot_is_drawn_once() -> None:
    """The same token has the same lot however much is held beside it, so chunks do not matter."""
    policy = make_policy("random", OPTIONS, PAGE_TOKENS)
    lots: dict[tuple[int, int], float] = {}
    for held_share, seen_tokens in ((0.3, 300), (1.5, 300), (0.6, 700)):
        observation = Case(held_share=held_share, seen_tokens=seen_tokens).observe()
        scores = policy.retain(observation).scores
        for head, row in enumerate(held_of(observation, scores)):
            for position, lot in zip(observation.positions[head].tolist(), row, strict=False):
                assert lots.setdefault((head, position), lot) == lot
    assert len(set(lots.values())) > 0.99 * len(lots), "heads and positions have lots of their own"


def test_lots_differ_by_layer_and_seed_and_are_even() -> None:
    observation = Case(held_share=1.5, seen_tokens=4000).observe()
    first = make_policy("random", OPTIONS, PAGE_TOKENS).retain(observation).scores
    layer = make_policy("random", OPTIONS, PAGE_TOKENS).retain(replace(observation, layer=1)).scores
    seed = make_policy("random", replace(OPTIONS, seed=1), PAGE_TOKENS).retain(observation).scores
    rows = torch.cat((first, layer, seed))
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.08
    tenths = torch.histc(rows, 10, 0, 1) / rows.numel()
    assert (tenths - 0.1).abs().max() < 0.01


def test_hash_of_words() -> None:
    expected = []
    for word in (0, 1, 2, 0xFFFFFFFF):
        for _ in range(2):
            word = ((word >> 16) ^ word) * 0x45D9F3B % 2**32
        expected.append((word >> 16) ^ word)
    assert mix(torch.tensor([0, 1, 2, 0xFFFFFFFF])).tolist() == expected


# --- snapkv and its relatives --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snapkv", "ada-snapkv", "pyramidkv", "sparsemm", "streammem"])
def test_scores_are_pooled_attention_alone(name: str) -> None:
    observation = Case(held_share=0.85).observe()
    retention = policy_for(name, OPTIONS, 4).retain(observation)
    assert retention.scores.tolist() == naive.pool(observation, 7)
    assert retention.is_static.all()


@repeatable
@given(case=CASES)
def test_snapkv_keeps_the_best_of_what_is_not_pinned(case: Case) -> None:
    observation = case.observe()
    retention = make_policy("snapkv", OPTIONS, PAGE_TOKENS).retain(observation)
    pooled = naive.pool(observation, 7)
    for head, kept in enumerate(kept_indices(retention, observation)):
        assert len(kept) == min(int(observation.lens[head]), case.budget_tokens)
        free = retention.tiers[head] == Tier.SCORED
        lost = [pooled[head][i] for i in range(int(observation.lens[head])) if i not in kept]
        won = [pooled[head][i] for i in kept if free[i]]
        assert max(lost, default=0.0) <= min(won, default=2.0)


@repeatable
@given(case=CASES)
def test_ada_snapkv_shares_by_score(case: Case) -> None:
    observation = replace(case.observe(), protected_position=case.seen_tokens)
    # the reference takes the share that the policy is to take, under its general name
    options = replace(OPTIONS, ada_floor_ratio=0.25, floor_ratio=0.25)
    retention = make_policy("ada-snapkv", options, PAGE_TOKENS).retain(observation)
    if observation.fits:
        assert retention.budgets.tolist() == observation.lens.tolist()
        return
    expected = naive.allocate(
        observation,
        retention.scores.tolist(),
        retention.tiers.tolist(),
        [True] * case.num_heads,
        options,
        PAGE_TOKENS,
    )
    assert retention.budgets.tolist() == expected


@pytest.mark.parametrize("name", ["snapkv", "streammem", "ada-snapkv"])
def test_without_a_probe_the_most_recent_stay(name: str) -> None:
    observation = replace(
        Case(held_share=1.5, budget_tokens=40).observe(), mass=None, topk_mass=None
    )
    kept = kept_indices(make_policy(name, OPTIONS, PAGE_TOKENS).retain(observation), observation)
    assert all(set(range(700 - 8, 700)) <= set(indices) for indices in kept)
    if name != "ada-snapkv":
        assert kept == [[0, 1, 2, 3, *range(700 - 36, 700)]] * 4


# --- layer and head budgets ----------------------------------------------------------------------


def test_pyramid_is_linear() -> None:
    """B = 408, window 8: 400 are open, the last layer gets 400 / 20 of them, the first 780."""
    policy = make_policy("pyramidkv", OPTIONS, PAGE_TOKENS)
    assert policy.layer_budgets(5, 2, 408) == (788, 598, 408, 218, 28)


@repeatable
@given(st.integers(1, 80), st.integers(16, 5000), st.integers(0, 500))
def test_pyramid_spends_the_budget(layers: int, budget_tokens: int, window_tokens: int) -> None:
    options = PolicyOptions(window_tokens=window_tokens)
    budgets = make_policy("pyramidkv", options, PAGE_TOKENS).layer_budgets(layers, 2, budget_tokens)
    assert budgets is not None and min(budgets) >= 1
    assert list(budgets) == sorted(budgets, reverse=True) and max(budgets) <= 2 * budget_tokens
    assert layers * budget_tokens - layers < sum(budgets) <= layers * budget_tokens


def test_sparsemm_shares() -> None:
    """r + s (1 - r) L H with L H = 8; nothing reaches the cap."""
    scores = [[1.0, 2.0], [3.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    shares = head_shares(scores, 0.5)
    expected = [[0.5 + score / 10 * 0.5 * 8 for score in row] for row in scores]
    assert torch.tensor(shares).allclose(torch.tensor(expected))


@repeatable
@given(
    st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_sparsemm_shares_have_mean_one(scores: list[list[float]], uniform_share: float) -> None:
    scores[0][0] += 1e-3
    flat = [share for row in head_shares(scores, uniform_share) for share in row]
    assert sum(flat) == pytest.approx(len(flat))
    assert min(flat) >= 0 and max(flat) <= 2 + 1e-9


def test_sparsemm_gives_heads_their_shares(tmp_path: Path) -> None:
    scores_file = tmp_path / "scores.json"
    scores_file.write_text(json.dumps([[0.0, 6.0], [1.0, 1.0]]), encoding="utf-8")
    options = replace(OPTIONS, head_scores_file=str(scores_file), uniform_share=0.5)
    policy = make_policy("sparsemm", options, PAGE_TOKENS)
    # 0.5 + s * 0.5 * 4: [0.5, 2.0 capped of 2.0], [0.75, 0.75]
    assert policy.layer_budgets(2, 2, 101) == (125, 75)
    observation = Case(num_heads=2, held_share=1.5, budget_tokens=125).observe()
    assert policy.retain(observation).budgets.tolist() == [50, 200]
    short = replace(observation, max_head_tokens=150)
    assert policy.retain(short).budgets.tolist() == [100, 150], "a surplus goes to the others"


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", "[[1, 2], [3]]", "[[0, 0]]", '[["a"]]', "[[-1, 2]]", "[[NaN]]", "[1]"),
        *("[[true, 1]]", "[[1e308, 1]]", f"[[1{'0' * 400}]]"),
    ],
    ids=lambda content: content[:15],
)
def test_sparsemm_refuses_a_file_that_is_no_table(tmp_path: Path, content: str) -> None:
    scores_file = tmp_path / "scores.json"
    scores_file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a JSON list with a list per layer"):
        make_policy("sparsemm", PolicyOptions(head_scores_file=str(scores_file)), PAGE_TOKENS)


@pytest.mark.parametrize(
    "content", [None, b"", b"[[1,", b"\xff\xfe", b"[" * 100_000], ids=lambda c: str(c)[:12]
)
def test_sparsemm_refuses_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    scores_file = tmp_path / "scores.json"
    if content is not None:
        scores_file.write_bytes(content)
    with pytest.raises(ValueError, match="--kv-head-scores-file .* cannot be read as JSON"):
        make_policy("sparsemm", PolicyOptions(head_scores_file=str(scores_file)), PAGE_TOKENS)


def test_sparsemm_refuses_another_model() -> None:
    policy = policy_for("sparsemm", OPTIONS, num_heads=2, num_layers=3)
    with pytest.raises(ValueError, match="3 layers of 2 KV heads, but this worker has 3 of 1"):
        policy.layer_budgets(3, 1, 100)


# --- keydiff ---------------------------------------------------------------------------------


@repeatable
@given(case=CASES)
def test_keydiff(case: Case) -> None:
    """Contrast is the score; `tests/ops/test_contrast.py` has its formula."""
    observation = case.observe()
    retention = make_policy("keydiff", OPTIONS, PAGE_TOKENS).retain(observation)
    assert observation.contrast is not None
    assert torch.equal(retention.scores, observation.contrast)


# --- infinipot-v -------------------------------------------------------------------------------


@repeatable
@given(case=CASES)
def test_recent_frames_are_whole_and_fit(case: Case) -> None:
    observation = replace(case.observe())
    assert observation.frame_ids is not None
    recent = recent_frames(observation, 0.25)
    room_tokens = case.budget_tokens // 4
    for head, count in enumerate(observation.lens.tolist()):
        frames = observation.frame_ids[head, :count].tolist()
        chosen: set[int] = set()
        for frame in sorted({f for f in frames if f >= 0}, reverse=True):
            size = sum(f in chosen or f == frame for f in frames)
            if chosen and size > room_tokens:
                break
            chosen.add(frame)
        assert recent[head, :count].tolist() == [f in chosen for f in frames]
        assert not recent[head, count:].any()


@repeatable
@given(case=CASES)
def test_novelty_is_minus_the_mean_cosine_with_the_same_patch(case: Case) -> None:
    observation = case.observe()
    assert observation.keys is not None
    assert observation.frame_ids is not None and observation.patch_ids is not None
    recent = recent_frames(observation, 0.25)
    answer = novelty(observation, recent)
    for head, count in enumerate(observation.lens.tolist()):
        keys = observation.keys[head, :count].double()
        patches = observation.patch_ids[head].tolist()
        for i in range(0, count, 7):
            if not observation.is_vision[head, i]:
                continue
            others = [j for j in range(count) if recent[head, j] and patches[j] == patches[i]]
            cosines = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in others]
            expected = -sum(cosines) / len(cosines) if cosines else 0.0
            assert float(answer[head, i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_average_pool_stops_at_gaps_and_borders(width: int) -> None:
    observation = Case(held_share=0.85, seen_tokens=200).observe()
    assert observation.value_norms is not None
    pooled = average_runs(observation.value_norms, run_index(observation), width // 2)
    for head, row in enumerate(held_of(observation, pooled)):
        norms = observation.value_norms[head].tolist()
        index = run_index(observation)[head].tolist()
        for i, found in enumerate(row):
            near = range(max(0, i - width // 2), min(len(row), i + width // 2 + 1))
            mine = [norms[j] for j in near if index[j] - index[i] == j - i]
            assert found == pytest.approx(sum(mine) / len(mine), rel=1e-5)


def test_ranks() -> None:
    assert ranks(torch.tensor([[0.5, 2.0, 0.5, -torch.inf, 1.0]])).tolist() == [[3, 0, 2, 4, 1]]


@pytest.mark.parametrize(("share", "by_key"), [(0.0, 0), (0.5, 30), (1.0, 60)])
def test_infinipot_v_splits_the_budget(share: float, by_key: int) -> None:
    """One list is the reverse of the other, so no token is high in both."""
    observation = Case(num_heads=1, seen_tokens=300, held_share=2.0).observe()
    count, positions = 300, observation.positions
    video = torch.ones(1, count, dtype=torch.bool)
    keys = torch.zeros(1, count, 8)
    angle = torch.linspace(0, 1.5, count)
    keys[0, :, 0], keys[0, :, 1] = angle.cos(), angle.sin()
    observation = replace(
        observation,
        keys=keys,
        value_norms=torch.arange(1.0, count + 1)[None],
        is_vision=video,
        span_ids=torch.ones_like(positions),
        frame_ids=positions.clone(),
        patch_ids=torch.zeros_like(positions),
        num_patches=1,
        budget_tokens=60,
        protected_position=count,
    )
    options = PolicyOptions(
        sink_tokens=0, window_tokens=0, redundancy_share=share, recent_frames_share=0.0
    )
    retention = make_policy("infinipot-v", options, PAGE_TOKENS).retain(observation)
    (kept,) = kept_indices(retention, observation)
    # the oldest keys differ most from the last frame; the newest values are the largest
    assert abs(sum(i < count // 2 for i in kept) - by_key) <= 1


def test_infinipot_v_keeps_text_and_recent_frames_before_other_vision() -> None:
    observation = Case(seen_tokens=700, held_share=1.5, budget_tokens=520).observe()
    retention = make_policy("infinipot-v", OPTIONS, PAGE_TOKENS).retain(observation)
    recent = recent_frames(observation, OPTIONS.recent_frames_share)
    assert recent.any() and not recent.all()
    for head, kept in enumerate(kept_indices(retention, observation)):
        must_stay = recent[head] | ~observation.is_vision[head]
        assert set(must_stay.nonzero()[:, 0].tolist()) <= set(kept)
        assert len(kept) == 520
