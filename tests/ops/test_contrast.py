"""`contrast`: the reference against a naive formula, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import assert_within_budget, make_cache
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.contrast import contrast
from vllm_budgetkv.ops.reference.contrast import contrast as contrast_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (0, 1, 15, 16, 17, 255, 257, 1000)


def check_contrast(lens: tuple[int, ...], layout: PageLayout, padding_tokens: int = 3) -> None:
    cache = make_cache([[5] * len(lens), lens], layout)
    arguments = (cache.heads_of(1), max(lens) + padding_tokens)
    actual, expected = contrast(*arguments), contrast_reference(*arguments)
    exact = contrast_reference(*arguments, torch.float64)
    naive = torch.zeros_like(exact)
    for head, num_tokens in enumerate(lens):
        keys = cache.head(1, head)[0].double()
        unit = keys / keys.norm(dim=1, keepdim=True)
        anchor = unit.sum(dim=0)
        naive[head, :num_tokens] = 1 - unit @ (anchor / anchor.norm())
        for found in (actual, expected):
            assert (found[head, num_tokens:] == 0).all(), "behind the last token"
    torch.testing.assert_close(exact, naive, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=2e-6)
    assert_within_budget(actual, expected, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 40, 64, 72, 128, 256])
def test_head_sizes(instruction_set: str, head_size: int, dtype: torch.dtype) -> None:
    check_contrast((131, 0, 17), PageLayout(16, head_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        check_contrast((131, 0, 17), PageLayout(16, head_size, dtype, is_quantised=True))


@pytest.mark.parametrize("page_tokens", [8, 16, 256])
def test_ragged_heads(instruction_set: str, page_tokens: int) -> None:
    check_contrast(RAGGED, PageLayout(page_tokens, 32, torch.float32))


def test_long_heads_keep_their_precision(instruction_set: str) -> None:
    check_contrast((20_000, 3), PageLayout(32, 32, torch.bfloat16))


def test_opposite_keys(instruction_set: str) -> None:
    """A key of zeros has no direction; one against all others has the largest contrast."""
    cache = make_cache([[9]], PageLayout(8, 32, torch.float32))
    for index in range(9):
        page, slot = cache.table[0, 0, index // 8], index % 8
        cache.pool.keys[page, slot] = {3: -2.0, 5: 0.0}.get(index, 1.0 + index)
    found = contrast(cache.heads_of(0), 9)[0]
    expected = torch.tensor([{3: 2.0, 5: 1.0}.get(index, 0.0) for index in range(9)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_nothing_held() -> None:
    cache = make_cache([[0, 0]], PageLayout(8, 32, torch.float32))
    assert contrast(cache.heads_of(0), 0).shape == (2, 0)
    assert (contrast(cache.heads_of(0), 5) == 0).all()


def test_wrong_arguments_are_refused() -> None:
    cache = make_cache([[40, 40]], PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match=r"table is .* pass torch.int32 \[any, any\]"):
        contrast(cache.heads, 40)
    with pytest.raises(ValueError, match="max_tokens is 73; a table of 9 pages of 8 tokens"):
        contrast(cache.heads_of(0), 73)
    with pytest.raises(ValueError, match="head 0 holds 40 tokens but max_tokens is 39"):
        contrast(cache.heads_of(0), 39)
    cache.table[0, 1, 4] = -1
    with pytest.raises(IndexError, match="entry 4 of a head is page -1"):
        contrast(cache.heads_of(0), 40)
