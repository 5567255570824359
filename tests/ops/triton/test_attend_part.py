"""`attend_part` and `stage` in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_stage as naive
from tests.ops.factories import make_cache
from tests.ops.recall_factory import make_remembered
from tests.ops.test_attend_part import DTYPES, FIRST_TOKENS, check_kernel
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import stage


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first_token", FIRST_TOKENS)
def test_runs(first_token: int, dtype: torch.dtype) -> None:
    cache = make_cache([[70, 133], [19, 0], [48, 5]], PageLayout(16, 64, dtype))
    check_kernel(cache, 4, [1, 2, 0], [66, 1, 5], first_token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        layout = PageLayout(16, head_size, dtype, is_quantised=True)
        cache = make_cache([[70, 133], [19, 0], [48, 5]], layout)
        check_kernel(cache, 4, [1, 2, 0], [66, 1, 5], 60)
        naive.check_stage(stage, layout, 1, 3)


@pytest.mark.parametrize(("group", "head_size"), [(1, 80), (3, 32), (7, 128), (16, 256)])
def test_shapes(group: int, head_size: int) -> None:
    cache = make_cache([[70, 33]], PageLayout(8, head_size, torch.bfloat16))
    check_kernel(cache, group, [0], [40], 64)


def test_large_scores() -> None:
    cache = make_cache([[700, 90]], PageLayout(16, 64, torch.float32))
    check_kernel(cache, 2, [0], [40], 20, query_scale=200.0)


@pytest.mark.parametrize("head_size", [32, 80])
@pytest.mark.parametrize(("first_block", "width"), [(0, 1), (1, 3), (4, 0)])
def test_stage(head_size: int, first_block: int, width: int) -> None:
    naive.test_pages_become_what_blocks_keep(stage, head_size, torch.bfloat16, first_block, width)


def test_stage_leaves_pages_whose_block_is_out_of_range() -> None:
    made = make_remembered([70, 40], PageLayout(16, 32, torch.float32), num_heads=2)
    made.tier.blocks[0, 1] = len(made.tier.tokens)
    pages, raw = made.cache.free_pages[0, :2].view(2, 1), made.cache.pool.raw.clone()
    stage(pages, made.cache.pool, 0, 1, made.tier)
    stage(pages, made.cache.pool, 0, made.tier.blocks.shape[1], made.tier)
    assert torch.equal(made.cache.pool.raw, raw)
