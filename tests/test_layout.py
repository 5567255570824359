"""The head-page: fields that share no byte, in a page that vLLM can see as tokens of one dtype."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_budgetkv.arithmetic.layout import (
    SUPPORTED_DTYPES,
    SUPPORTED_PAGE_TOKENS,
    BlockLayout,
    PageLayout,
    PagePool,
)

HEAD_SIZES = range(32, 257, 8)
SHAPES = [*itertools.product(SUPPORTED_PAGE_TOKENS, SUPPORTED_DTYPES)]


@pytest.mark.parametrize(("page_tokens", "dtype"), SHAPES)
def test_a_page_is_whole_elements_per_token(page_tokens: int, dtype: torch.dtype) -> None:
    """A page of 256 tokens of 64 elements had 265 bytes per token, which is no view of bfloat16."""
    for head_size in HEAD_SIZES:
        layout = PageLayout(page_tokens, head_size, dtype)
        page = torch.empty(page_tokens, layout.token_bytes, dtype=torch.uint8)
        assert page.numel() == layout.page_bytes
        assert page.view(dtype).numel() * dtype.itemsize == layout.page_bytes
        assert layout.page_bytes % 256 == 0


@pytest.mark.parametrize(("page_tokens", "dtype"), SHAPES)
def test_fields_share_no_byte(page_tokens: int, dtype: torch.dtype) -> None:
    """Written one by one, each field still reads as what it was written as."""
    for head_size in (32, 40, 256):
        layout = PageLayout(page_tokens, head_size, dtype)
        pool = PagePool(torch.zeros(2, layout.page_bytes, dtype=torch.uint8), layout)
        fields = (pool.keys, pool.values, pool.digests, pool.positions)
        for number, field in enumerate(fields, start=1):
            assert field.data_ptr() % 16 == field.stride(0) * field.element_size() % 16 == 0
            field.fill_(number)
        for number, field in enumerate(fields, start=1):
            assert (field == number).all()


@pytest.mark.parametrize(
    ("page_tokens", "head_size", "dtype", "page_bytes"),
    [
        (16, 128, torch.bfloat16, 8960),
        (32, 80, torch.bfloat16, 10752),
        (64, 64, torch.bfloat16, 16896),
        (128, 128, torch.float32, 132608),
    ],
)
def test_a_page_pays_for_its_fields_alone(
    page_tokens: int, head_size: int, dtype: torch.dtype, page_bytes: int
) -> None:
    """Two keys' worth of digest, 4 bytes of position per token, and less than 256 of padding."""
    layout = PageLayout(page_tokens, head_size, dtype)
    vectors_bytes = 2 * (page_tokens + 1) * head_size * dtype.itemsize
    assert 0 <= page_bytes - vectors_bytes - 4 * page_tokens < 256
    assert layout.page_bytes == page_bytes


@pytest.mark.parametrize("all_pages", [True, False])
def test_poison_covers_whole_pages(all_pages: bool) -> None:
    layout = PageLayout(8, 32, torch.bfloat16)
    pool = PagePool(torch.zeros(3, layout.page_bytes, dtype=torch.uint8), layout)
    pool.poison(None if all_pages else torch.tensor([1]))
    poisoned = torch.tensor([all_pages, True, all_pages])
    for field in (pool.keys, pool.values, pool.digests):
        assert torch.equal(field.isnan().flatten(1).all(1), poisoned)
    huge = torch.iinfo(torch.int32).max
    assert torch.equal((pool.positions == huge).all(1), poisoned)


@pytest.mark.parametrize("unused_pages", [0, 5])
@pytest.mark.parametrize("head_pages", [1, 3, 34])
def test_blocks_are_pages_of_their_own(head_pages: int, unused_pages: int) -> None:
    """By the formula, written out; no page belongs to two blocks, nor to none but the unused."""
    blocks = BlockLayout(3, 2, head_pages, unused_pages)
    ids = torch.tensor([4, 0, 1], dtype=torch.int32)
    pages = blocks.pages_of(ids)
    assert pages.shape == (3, 2, 3 * head_pages)
    assert pages.dtype == torch.int32
    stride_pages = 6 * head_pages + unused_pages
    for layer, head, place in itertools.product(range(3), range(2), range(3 * head_pages)):
        block, page = ids[place // head_pages], place % head_pages
        expected = block * stride_pages + (layer * 2 + head) * head_pages + page
        assert pages[layer, head, place] == expected
    assert pages.unique().numel() == pages.numel()
    assert (pages % stride_pages < 6 * head_pages).all()


def test_a_block_of_one_page_is_as_it_was() -> None:
    """Block, layer, head."""
    pages = BlockLayout(2, 3).pages_of(torch.tensor([7], dtype=torch.int32))
    assert pages.flatten().tolist() == [*range(42, 48)]
