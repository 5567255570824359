"""`digest` in Triton against the naive formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import make_cache
from tests.ops.test_digest import DTYPES, check_digest
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.digest import digest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 96, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    check_digest((67, 0, 17), PageLayout(16, head_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        check_digest((67, 0, 17), PageLayout(16, head_size, dtype, is_quantised=True))


@pytest.mark.parametrize("page_tokens", [8, 64, 256])
def test_ragged_heads(page_tokens: int) -> None:
    check_digest((0, 1, 15, 16, 17, 300), PageLayout(page_tokens, 32, torch.float32))


def test_single_token_is_its_own_centre() -> None:
    cache = make_cache([[1]], PageLayout(8, 32, torch.bfloat16))
    digest(cache.heads_of(0))
    centre, radius = cache.pool.digests[cache.table[0, 0, 0].long()]
    assert torch.equal(centre, cache.head(0, 0)[0][0])
    assert torch.equal(radius, torch.zeros(32, dtype=torch.bfloat16))
