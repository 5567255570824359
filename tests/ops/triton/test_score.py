"""`score` in Triton against the naive formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import SOFTMAXES, make_cache
from tests.ops.test_score import DTYPES, check_pointing_rows, check_score
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.score import score as score_reference
from vllm_budgetkv.ops.score import Scores, score
from vllm_budgetkv.ops.triton import score as launcher


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_head_sizes(takes_largest: bool, head_size: int, dtype: torch.dtype) -> None:
    check_score((131, 0, 17), PageLayout(16, head_size, dtype), takes_largest, num_rows=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(takes_largest: bool, dtype: torch.dtype) -> None:
    for head_size, kind in ((32, "plain"), (72, "cap-and-sinks"), (256, "plain")):
        layout = PageLayout(16, head_size, dtype, is_quantised=True)
        check_score((131, 0, 17), layout, takes_largest, num_rows=3, kind=kind)


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_softmax(takes_largest: bool, kind: str) -> None:
    """Of one run of keys, and of several."""
    layout = PageLayout(16, 32, torch.float32)
    check_score((300, 0, 17), layout, takes_largest, group=5, num_rows=3, kind=kind)


@pytest.mark.parametrize(("page_tokens", "group"), [(8, 3), (64, 7)])
def test_ragged_heads(takes_largest: bool, page_tokens: int, group: int) -> None:
    layout = PageLayout(page_tokens, 32, torch.float32)
    result = check_score((0, 1, 16, 300), layout, takes_largest, group=group, num_rows=2)
    assert torch.equal(result.mass[0], torch.zeros(307))
    assert torch.equal(result.topk_mass[: 2 * group], torch.ones(2 * group))


@pytest.mark.parametrize("num_rows", [1, 33])
def test_probe_rows(takes_largest: bool, num_rows: int) -> None:
    check_score((70,), PageLayout(16, 64, torch.bfloat16), takes_largest, num_rows=num_rows)


@pytest.mark.parametrize(
    ("num_sinks", "top_k", "resident_tokens"),
    [(0, 1, 8192), (70, 64, 8192), (4, 2000, 8192), (10**6, 8, 8192), (0, 1, 64), (70, 64, 64)],
)
def test_top_k_and_sinks(
    monkeypatch: pytest.MonkeyPatch,
    takes_largest: bool,
    num_sinks: int,
    top_k: int,
    resident_tokens: int,
) -> None:
    """Also with rows too long to be ranked in registers."""
    monkeypatch.setattr(launcher, "MAX_RESIDENT_TOKENS", resident_tokens)
    layout = PageLayout(16, 32, torch.float32)
    numbers = {"num_rows": 2, "top_k": top_k, "num_sinks": num_sinks}
    result = check_score((150, 97), layout, takes_largest, **numbers)
    if num_sinks == 10**6:
        assert torch.equal(result.topk_mass, torch.ones(4))


def test_one_row_that_points_is_enough_for_the_largest() -> None:
    check_pointing_rows(score)


def test_equal_weights_tie(takes_largest: bool) -> None:
    """All weights tie at the boundary of the top k, which then cuts through them."""
    cache = make_cache([[100]], PageLayout(16, 32, torch.float32))
    cache.pool.keys[:] = 1.0
    result = score(torch.ones(3, 2, 32), cache.heads_of(0), 0.1, 30, 0, takes_largest, 100)
    torch.testing.assert_close(result.mass, torch.full((1, 100), 0.01))
    torch.testing.assert_close(result.topk_mass, torch.full((2,), 0.3))


def test_strong_sinks_do_not_hide_the_rest(takes_largest: bool) -> None:
    """The rest's weights underflow next to the sink's, their renormalised shares must not."""
    cache = make_cache([[90]], PageLayout(16, 32, torch.float32))
    first_page = cache.table[0, 0, 0].long()
    cache.pool.keys[:] = 0.0
    cache.pool.keys[first_page, 0] = 100.0
    cache.pool.positions[first_page, 0] = 0
    result = score(torch.ones(2, 1, 32), cache.heads_of(0), 1.0, 10, 1, takes_largest, 90)
    assert result.mass[0, 0] == 1.0
    torch.testing.assert_close(result.topk_mass, torch.tensor([10 / 89]))


def test_probe_of_another_dtype_and_no_tokens(takes_largest: bool) -> None:
    cache = make_cache([[40, 9]], PageLayout(16, 32, torch.bfloat16))
    probe = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for max_tokens in (40, 0):
        lens = cache.lens[0].clamp(max=max_tokens)
        heads = cache.heads_of(0)._replace(lens=lens)
        arguments = (probe, heads, 0.2, 5, 1, takes_largest, max_tokens)
        if max_tokens:
            expected = Scores(*score_reference(*arguments))
            for got, wanted in zip(score(*arguments), expected, strict=True):
                torch.testing.assert_close(got, wanted)
        else:
            assert torch.equal(score(*arguments).topk_mass, torch.ones(4))
