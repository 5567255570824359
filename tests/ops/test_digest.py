"""`digest`: the reference against a naive formula, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import assert_within_budget, make_cache
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.digest import digest
from vllm_budgetkv.ops.reference.digest import digest as digest_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (0, 1, 15, 16, 17, 1000)


def check_digest(lens: tuple[int, ...], layout: PageLayout) -> None:
    cache = make_cache([[5] * len(lens), lens], layout)
    reference = cache.clone()
    digest(cache.heads_of(1))
    digest_reference(reference.heads_of(1))

    page_tokens = layout.page_tokens
    exact: list[torch.Tensor] = []
    pages: list[int] = []
    for head in range(len(lens)):
        pages += cache.table[1, head, : -(-lens[head] // page_tokens)].tolist()
        for first in range(0, lens[head], page_tokens):
            keys = cache.head(1, head)[0][first : first + page_tokens].double()
            centre = (keys.amax(0) + keys.amin(0)) / 2
            exact.append(torch.stack((centre, (keys - centre).abs().mean(0))))
    got, low_precision = cache.pool.digests[pages], reference.pool.digests[pages]
    eps, boxes = torch.finfo(layout.dtype).eps, torch.stack(exact)
    torch.testing.assert_close(low_precision.double(), boxes, rtol=4 * eps, atol=eps)
    assert_within_budget(got, low_precision, boxes)

    others = torch.ones(cache.pool.num_pages, dtype=torch.bool)
    others[pages] = False
    for pool in (cache.pool, reference.pool):
        assert pool.digests[others].isnan().all(), "wrote a page that the request does not hold"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 40, 64, 72, 128, 256])
def test_head_sizes(instruction_set: str, head_size: int, dtype: torch.dtype) -> None:
    check_digest((131, 0, 17), PageLayout(16, head_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        check_digest((131, 0, 17), PageLayout(16, head_size, dtype, is_quantised=True))


@pytest.mark.parametrize("page_tokens", [8, 16, 256])
def test_ragged_heads(instruction_set: str, page_tokens: int) -> None:
    check_digest(RAGGED, PageLayout(page_tokens, 32, torch.float32))


def test_single_token_is_its_own_centre(instruction_set: str) -> None:
    cache = make_cache([[1]], PageLayout(8, 32, torch.bfloat16))
    digest(cache.heads_of(0))
    centre, radius = cache.pool.digests[cache.table[0, 0, 0].long()]
    assert torch.equal(centre, cache.head(0, 0)[0][0])
    assert torch.equal(radius, torch.zeros(32, dtype=torch.bfloat16))


def test_wrong_arguments_are_refused() -> None:
    cache = make_cache([[40, 40]], PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match=r"table is .* pass torch.int32 \[any, any\]"):
        digest(cache.heads)
    cache.table[0, 1, 4] = -1
    with pytest.raises(IndexError, match="entry 4 of a head is page -1"):
        digest(cache.heads_of(0))
