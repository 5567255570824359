"""`merge` in Triton against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_merge as naive
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.merge import MERGE_MODES, merge


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize(
    ("head_size", "dtype"), [(32, torch.float32), (80, torch.bfloat16), (256, torch.float16)]
)
def test_head_sizes(head_size: int, dtype: torch.dtype, mode: str) -> None:
    case = naive.make_case((0, 1, 17, 70), PageLayout(16, head_size, dtype), 0.4)
    assert naive.check_merge(*case, mode) > 10


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype, mode: str) -> None:
    case = naive.make_case((0, 1, 17, 70), PageLayout(16, 72, dtype, is_quantised=True), 0.4)
    assert naive.check_merge(*case, mode, 0.7) > 10


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize(("share", "page_tokens"), [(0.05, 8), (0.6, 256)])
def test_shares_and_page_sizes(share: float, page_tokens: int, mode: str) -> None:
    """Several blocks of dropped tokens, of kept ones, and of sources of one pivot."""
    case = naive.make_case((180, 33), PageLayout(page_tokens, 64, torch.float32), share, seed=3)
    assert naive.check_merge(*case, mode) > 0


@pytest.mark.parametrize("mode", MERGE_MODES)
def test_nothing_dropped_or_nothing_kept(mode: str) -> None:
    cache, keep, is_vision = naive.make_case((50, 7), PageLayout(8, 32, torch.float32), 0.5)
    for all_stay in (True, False):
        keep = torch.full_like(keep, all_stay)
        assert naive.check_merge(cache.clone(), keep, is_vision, mode) == 0


def test_a_modality_of_which_nothing_stays_is_lost_by_value() -> None:
    naive.test_a_modality_of_which_nothing_stays_is_lost_by_value()


@pytest.mark.parametrize("threshold", [-1.0, 0.8, 1.01])
def test_threshold(threshold: float) -> None:
    naive.test_threshold(threshold, threshold < 1)


def test_equal_cosines_go_to_the_lower_index() -> None:
    naive.test_equal_cosines_go_to_the_lower_index(merge)


def test_weighted_compares_positions_over_heads() -> None:
    naive.test_weighted_compares_positions_over_heads()
