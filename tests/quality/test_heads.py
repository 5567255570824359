"""Head classes: rates and agreements by hand, and the trace of a real prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.quality import heads, heads_plot
from benchmarks.quality.text_tasks import TEXT_TASKS, make_text_examples
from vllm_budgetkv.policy import Observation, PolicyOptions

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT = heads.THRESHOLDS.index(PolicyOptions.static_threshold)


def trace(*chunks: list[list[int]]) -> heads.Trace:
    """A prompt whose heads are static (1) or dynamic (0), [L][H] per chunk, at all thresholds."""
    classes = np.array(chunks, dtype=bool)
    tokens = [100 * (index + 1) for index in range(len(chunks))]
    everywhere = np.broadcast_to(classes, (len(heads.THRESHOLDS), *classes.shape))
    return heads.Trace(tokens, classes.astype(float), everywhere)


def test_dynamic_share_is_that_of_the_last_chunk() -> None:
    share = heads.dynamic_share([trace([[1, 1]], [[0, 1]]), trace([[0, 0]], [[1, 1]])])
    assert share[DEFAULT].tolist() == [[0.5, 0.0]]


def test_change_rates() -> None:
    moving = trace([[1, 1], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]])
    still = trace(*[[[1, 1], [0, 0]]] * 3)
    rates = heads.change_rates([moving, still])
    # two changes of chunk, as the shorter prompt has three; layers side by side
    assert rates[DEFAULT].tolist() == [[0.25, 0.0], [0.25, 0.5]]


def test_agreement() -> None:
    one, other = np.array([[[1.0, 0.5]]]), np.array([[[0.25, 0.0]]])
    assert heads.agreement(one, other).tolist() == [(0.25 + 0.5) / 2]
    assert heads.majority_agreement(one, other).tolist() == [0.5]


def test_summary_and_map(tmp_path: Path) -> None:
    static, dynamic = trace([[1, 1]], [[1, 1]]), trace([[1, 1]], [[0, 1]])
    report = heads.summarise({"needle": [static], "count": [dynamic], "prose": [dynamic, static]})
    assert report["agreement_of_two_video_tasks"][DEFAULT] == 0.5
    # prose is dynamic on half of its prompts, so it agrees with either task as often
    assert report["agreement_of_text_and_video_task"][DEFAULT] == 0.75
    assert report["majority_agreement_of_text_and_video"][DEFAULT] == 1.0
    needle = report["tasks"]["needle"]
    assert np.array(needle["concentration_quantiles_of_last_chunk"]).tolist() == [[1.0]] * 5
    assert len(heads.table(report).splitlines()) == 2 + 3 + 3
    heads_plot.draw(report, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_text_examples_show_no_video(name: str) -> None:
    first, second = make_text_examples(name, 600, 2)
    assert not first.talk.scenes and "video" not in first.talk.content
    assert first.talk.content != second.talk.content
    assert first.talk == make_text_examples(name, 600, 1)[0].talk
    question, answer = first.talk.turns[-1]
    assert question.rstrip("?") in first.talk.content or name == "prose"
    assert answer in first.talk.content


def observe(*topk_mass: float) -> Observation:
    """One KV head with a query head per number."""
    return Observation(
        mass=None,
        topk_mass=torch.tensor(topk_mass),
        value_norms=None,
        positions=torch.zeros(1, 4, dtype=torch.int32),
        lens=torch.tensor([4], dtype=torch.int32),
        is_vision=torch.zeros(1, 4, dtype=torch.bool),
        span_ids=torch.zeros(1, 4, dtype=torch.int32),
        seen_tokens=4,
        protected_position=4,
        budget_tokens=4,
        max_head_tokens=8,
    )


def test_each_threshold_has_a_history_of_its_own() -> None:
    pieces = heads.Pieces()
    for mass in (0.92, 0.87, 0.83, 0.92):
        pieces.see(observe(1.0, mass), PolicyOptions(hysteresis=0.05))
    found = pieces.trace()
    np.testing.assert_allclose(found.concentration[:, 0, 0], [0.92, 0.87, 0.83, 0.92], rtol=1e-6)
    # stays static down to 0.85 and is static again from 0.95
    assert found.is_static[DEFAULT, :, 0, 0].tolist() == [True, True, False, False]
    assert found.is_static[heads.THRESHOLDS.index(0.8), :, 0, 0].all()
    assert not found.is_static[heads.THRESHOLDS.index(0.99)].any()


def test_a_compression_without_a_probe_is_refused() -> None:
    blind = replace(observe(1.0), topk_mass=None)
    with pytest.raises(ValueError, match="no probe behind 4 tokens"):
        heads.Pieces().see(blind, PolicyOptions())


@pytest.mark.engine
@pytest.mark.parametrize("index", [0, 1])
def test_trace_of_a_real_prefill(looked_inside: dict[str, Any], index: int) -> None:
    run = looked_inside["compressed"]
    found = heads.Trace(**run["traces"][index])
    assert found.seen_tokens[-1] == run["prompt_tokens"][index]
    assert np.all(np.diff(found.seen_tokens) > 0) and len(found.seen_tokens) > 1
    shape = (len(found.seen_tokens), *run["end"][index]["is_static"].shape)
    assert found.concentration.shape == shape
    assert np.all((found.concentration > 0) & (found.concentration <= 1 + 1e-6))
    # at the default threshold the classes are those that the engine used
    assert np.array_equal(found.is_static[DEFAULT, -1], run["end"][index]["is_static"].numpy())
    first = found.concentration[0] >= np.array(heads.THRESHOLDS)[:, None, None]
    assert np.array_equal(found.is_static[:, 0], first)
    assert 0 < first.mean() < 1, "thresholds on both sides of a concentration"
