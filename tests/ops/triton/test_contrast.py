"""`contrast` in Triton against the naive formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import make_cache
from tests.ops.test_contrast import DTYPES, check_contrast
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.contrast import contrast
from vllm_budgetkv.ops.triton import contrast as launcher


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 96, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    check_contrast((67, 0, 17), PageLayout(16, head_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        check_contrast((67, 0, 17), PageLayout(16, head_size, dtype, is_quantised=True))


@pytest.mark.parametrize("page_tokens", [8, 64, 256])
def test_ragged_heads(monkeypatch: pytest.MonkeyPatch, page_tokens: int) -> None:
    monkeypatch.setattr(launcher, "MIN_RUN_TOKENS", 32)
    check_contrast((0, 1, 15, 16, 17, 31, 33, 300), PageLayout(page_tokens, 32, torch.float32))


def test_runs_grow_with_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MIN_RUN_TOKENS", 32)
    monkeypatch.setattr(launcher, "MAX_RUNS", 3)
    check_contrast((700, 129, 0), PageLayout(16, 32, torch.float32), padding_tokens=40)


def test_nothing_held() -> None:
    cache = make_cache([[0, 0]], PageLayout(8, 32, torch.float32))
    assert contrast(cache.heads_of(0), 0).shape == (2, 0)
    assert (contrast(cache.heads_of(0), 5) == 0).all()
