"""The metrics: formulas on tensors small enough to check by hand, and what the recorders saw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.quality import metrics
from benchmarks.quality.inside import Prefill
from tests.quality.job import PAGE_TOKENS, QUERY_TOKENS, QUOTA_PAGES

DOUBLE = torch.float64
# one KV head, one query head, one query, four tokens
WEIGHTS = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=DOUBLE).view(1, 1, 1, 4)
VALUES = torch.tensor([[8.0, 0.0], [0.0, 8.0], [8.0, 0.0], [0.0, 8.0]], dtype=DOUBLE)[None]
FIRST_TWO = torch.tensor([[True, True, False, False]])


def test_attention_is_causal_and_scaled() -> None:
    keys = torch.tensor([[math.log(3.0)], [0.0], [5.0]], dtype=DOUBLE)[None]
    queries = torch.tensor([[2.0], [4.0]], dtype=DOUBLE)[:, None]
    weights = metrics.attention(queries, torch.tensor([0, 1]), keys, scale=0.5)
    assert weights.shape == (1, 1, 2, 3) and weights.dtype == DOUBLE
    # the second query: logits 2 log 3 and 0, the third key is behind it
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(weights[0, 0], expected)


def test_query_heads_of_a_kv_head_are_neighbours() -> None:
    keys = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]], dtype=DOUBLE)
    queries = torch.tensor([[[50.0], [0.0], [50.0], [0.0]]], dtype=DOUBLE)
    weights = metrics.attention(queries, torch.tensor([1]), keys, scale=1.0)
    expected = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]], dtype=DOUBLE)
    torch.testing.assert_close(weights[:, :, 0], expected)


def test_retained_mass() -> None:
    assert metrics.retained_mass(WEIGHTS, FIRST_TWO).tolist() == [0.75]
    both = torch.cat([WEIGHTS, WEIGHTS.flip(-1)], dim=1)  # a second query head
    assert metrics.retained_mass(both, FIRST_TWO).tolist() == [0.5]


def test_output_error() -> None:
    # o = (5, 3); renormalised over the first two 8 * (2/3, 1/3)
    expected = math.hypot(5 - 16 / 3, 3 - 8 / 3) / math.hypot(5, 3)
    error = metrics.output_error(WEIGHTS, VALUES, FIRST_TWO)
    torch.testing.assert_close(error, torch.tensor([expected], dtype=DOUBLE))
    assert metrics.output_error(WEIGHTS, VALUES, torch.ones(1, 4).bool()).tolist() == [0.0]
    assert metrics.output_error(WEIGHTS, VALUES, torch.zeros(1, 4).bool()).tolist() == [1.0]


@pytest.mark.parametrize(
    ("kept", "num_pages", "touched", "whole"),
    [
        # pages 0 and 2 hold 0.4 and 0.35; the four best tokens are 0, 4, 5 and 2, two of them there
        ([0, 1, 2, 3, 4, 5, 6], 2, 1.0, 1.0),
        ([0, 4], 2, 1.0, 0.5),
        ([4, 5], 2, 0.5, 0.5),
        # token 1 shares the best page but is none of the best tokens
        ([1], 2, 0.0, 0.0),
        ([0], 1, 1.0, 1.0),
        # more pages than there are: all tokens are the best
        ([0, 1, 2], 9, 0.5, 0.25),
    ],
)
def test_page_recall(kept: list[int], num_pages: int, touched: float, whole: float) -> None:
    mass = torch.tensor([0.39, 0.01, 0.15, 0.02, 0.2, 0.15, 0.08], dtype=DOUBLE)
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, kept] = True
    if num_pages == 1:
        mass = torch.tensor([0.49, 0.2, 0.1, 0.01, 0.1, 0.05, 0.05], dtype=DOUBLE)
        mask[0, 1] = True
    found = metrics.page_recall(mass.view(1, 1, 1, 7), mask, 2, num_pages)
    assert [x.tolist() for x in found] == [[touched], [whole]]


def test_a_page_of_many_small_weights_is_not_the_best() -> None:
    """Page 0 has the most attention, 0.4, but none of the four best tokens."""
    mass = torch.tensor([0.1] * 4 + [0.12, 0.11, 0.11, 0.02] + [0.12, 0, 0, 0], dtype=DOUBLE)
    kept = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4]).bool()
    found = metrics.page_recall(mass.view(1, 1, 1, 12), kept, 4, 1)
    assert [x.tolist() for x in found] == [[1.0], [1.0]]


def test_weights_that_underflow_still_rank() -> None:
    mass = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=DOUBLE)
    touched, whole = metrics.page_recall(mass.view(1, 1, 1, 5), torch.ones(1, 5).bool(), 1, 5)
    assert (touched.tolist(), whole.tolist()) == ([1.0], [1.0])


def test_mean_cosine() -> None:
    keys = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=DOUBLE)
    # pairs: 0, -1, 0
    assert metrics.mean_cosine(keys) == pytest.approx(-1 / 3, abs=1e-15)
    assert metrics.mean_cosine(5 * keys[:1].expand(4, 2)) == pytest.approx(1.0)
    assert math.isnan(metrics.mean_cosine(keys[:1]))


@pytest.mark.engine
def test_another_prompt_is_refused(looked_inside: dict[str, Any]) -> None:
    prefill = Prefill(**looked_inside["full"]["prefills"][0])
    with pytest.raises(ValueError, match="same prompts"):
        metrics.measure(prefill, torch.ones(2, 2, 7).bool(), [1.0, 1.0], PAGE_TOKENS, 4)


@pytest.mark.engine
@pytest.mark.parametrize("index", [0, 1])
def test_recorded_cache_is_the_engines(looked_inside: dict[str, Any], index: int) -> None:
    found, end = looked_inside["full"]["prefills"][index], looked_inside["full"]["end"][index]
    num_tokens = found["keys"].shape[2]
    assert num_tokens == looked_inside["full"]["prompt_tokens"][index]
    assert end["lens"].unique().tolist() == [num_tokens]
    assert torch.equal(found["keys"], end["keys"][:, :, :num_tokens])
    assert torch.equal(found["values"], end["values"][:, :, :num_tokens])


@pytest.mark.engine
@pytest.mark.parametrize("index", [0, 1])
def test_recorded_queries_give_the_engines_outputs(
    looked_inside: dict[str, Any], index: int
) -> None:
    """Order, positions, causality and scale at once."""
    found, end = looked_inside["full"]["prefills"][index], looked_inside["full"]["end"][index]
    positions = torch.tensor(found["positions"])
    assert len(positions) == QUERY_TOKENS
    for layer, queries in enumerate(found["queries"]):
        scale = end["scales"][layer]
        weights = metrics.attention(queries, positions, found["keys"][layer], scale)
        out = weights @ found["values"][layer].double()[:, None]
        out = out.permute(2, 0, 1, 3).flatten(1)
        torch.testing.assert_close(out.float(), end["outputs"][layer], rtol=1e-4, atol=1e-5)


@pytest.mark.engine
@pytest.mark.parametrize("index", [0, 1])
def test_measures_of_a_real_compression(looked_inside: dict[str, Any], index: int) -> None:
    prefill = Prefill(**looked_inside["full"]["prefills"][index])
    end = looked_inside["compressed"]["end"][index]
    kept = looked_inside["compressed"]["kept"][index]
    assert torch.equal(kept.sum(dim=-1), end["lens"].long()), "every position once"
    scales = [end["scales"][layer] for layer in range(len(kept))]
    found = metrics.measure(prefill, kept, scales, PAGE_TOKENS, QUOTA_PAGES)
    everything = torch.ones_like(kept)
    lossless = metrics.measure(prefill, everything, scales, PAGE_TOKENS, QUOTA_PAGES)
    assert [(q.layer, q.head) for q in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for quality, full in zip(found, lossless, strict=True):
        assert quality.kept_tokens < full.kept_tokens == kept.shape[-1]
        assert full.retained_mass == pytest.approx(1.0) and full.output_error < 1e-12
        assert full.pages_touched == full.pages_whole == 1.0
        assert full.similarity_after == full.similarity_before == quality.similarity_before
        assert 0 < quality.retained_mass < 1 and 0 < quality.output_error < 1
        assert quality.pages_whole <= quality.pages_touched <= 1
    means = metrics.means(found)
    assert means["kept_tokens"] == kept.sum() / kept[..., 0].numel()
    assert means["retained_mass"] > means["kept_tokens"] / kept.shape[-1], "better than by chance"
