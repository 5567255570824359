"""`stage`: blocks of host memory become pages, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.recall_factory import make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import stage
from vllm_budgetkv.ops.reference.stage import stage as stage_reference

if TYPE_CHECKING:
    from collections.abc import Callable

OPS = pytest.mark.parametrize("op", [stage_reference, stage], ids=["reference", "op"])


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [32, 80])
@pytest.mark.parametrize(("first_block", "width"), [(0, 1), (1, 3), (4, 0)])
def test_pages_become_what_blocks_keep(
    op: Callable[..., None], head_size: int, dtype: torch.dtype, first_block: int, width: int
) -> None:
    check_stage(op, PageLayout(16, head_size, dtype), first_block, width)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_pages(op: Callable[..., None], dtype: torch.dtype) -> None:
    check_stage(op, PageLayout(16, 72, dtype, is_quantised=True), 1, 3)


def check_stage(op: Callable[..., None], layout: PageLayout, first_block: int, width: int) -> None:
    made = make_remembered([300, 40], layout, num_heads=3)
    pool = made.cache.pool
    pages = torch.randperm(len(pool.raw))[: 3 * width].int().view(3, width)
    raw = pool.raw.clone()
    op(pages, pool, 0, first_block, made.tier)
    blocks = made.tier.blocks[0, first_block : first_block + width].long()
    kept = made.tier.tokens[blocks].transpose(0, 1)
    for number, field in enumerate((pool.keys, pool.values)):
        torch.testing.assert_close(
            field[pages.long()], kept[:, :, number], rtol=0, atol=0, equal_nan=True
        )
    # all but keys and values of these pages is as it was
    others = torch.ones(len(raw), dtype=torch.bool)
    others[pages.flatten().long()] = False
    assert torch.equal(pool.raw[others], raw[others])
    behind = layout.digest_offset_bytes
    assert torch.equal(pool.raw[:, behind:], raw[:, behind:])


def test_stage_refuses_what_would_read_or_write_outside() -> None:
    made = make_remembered([300, 40], PageLayout(16, 32, torch.float32), num_heads=2)
    pages = torch.arange(4, dtype=torch.int32).view(2, 2)
    with pytest.raises(ValueError, match="pages is"):
        stage(pages[:1], made.cache.pool, 0, 0, made.tier)
    with pytest.raises(IndexError, match="block"):
        stage(pages, made.cache.pool, 1, 2, made.tier)
    pages[1, 1] = 10**6
    with pytest.raises(IndexError, match="page 1000000"):
        stage(pages, made.cache.pool, 0, 0, made.tier)
