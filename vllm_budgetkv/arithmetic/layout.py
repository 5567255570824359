"""The head-page: where every byte of one page of one KV head lies.

Legend: P pages in the pool, N tokens of a page, D head size, L layers, H KV heads, m head-pages of
a head in a block.

A head-page holds N tokens of one layer and one KV head. It is a struct, so that everything a
policy needs of a token travels with the token and is charged to the pool:

    K [N, D] | V [N, D] | centre [D] | radius [D] | position int32 [N] | pad

Centre and radius, the page's digest, have the dtype that the model computes in; so have K and V,
unless they are quantised: then they are 8-bit floats, in units of a scale of their layer.
Values of fewer elements than keys have zeros behind them. `position` is the logical index of the
token in its request. Pages are multiples of 256 bytes, so every field starts on a 16-byte boundary.

A head-page may hold an index instead, what the device knows of consecutive tokens in host memory,
by R of the D channels of their keys, in E entries for g neighbouring tokens each:

    codes int32 [E, R / 8] marks int32 [E g / 32] over K and V | mean [D] | step [R] channel [R]

A code is 4 bits, that of channel r at bit 4 (r % 8) of word r / 8 of its entry; a code c says that
channel `channel[r]` of the key, with g > 1 of the mean of the keys, is `mean + step (c - 7.5)`. The
other channels are at their mean. A mark is a bit a token: whether the head holds it on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_budgetkv.arithmetic.index_page import entries_of_page

PAGE_ALIGNMENT_BYTES = 256
SUPPORTED_PAGE_TOKENS = (8, 16, 32, 64, 128, 256)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of quantised keys and values: 4 bits of exponent, 3 of mantissa, no infinity, 448 at most
QUANTISED_DTYPE = torch.float8_e4m3fn
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 32, 256
# channels of a key whose 4-bit codes share a word
CODES_PER_WORD = 8
# of its channels, one is coded
CODED_SHARE = 4


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of the fields of a head-page.

    Args:
        page_tokens: tokens of a page (N), one of `SUPPORTED_PAGE_TOKENS`.
        head_size: elements of a key and of a value as they are stored (D), 32 to 256, a multiple
            of 8.
        dtype: that the model computes in, of queries, answers and digests; one of
            `SUPPORTED_DTYPES`.
        is_quantised: whether keys and values are stored as 8-bit floats.

    Raises:
        ValueError: a size or dtype is not supported.
    """

    page_tokens: int
    head_size: int
    dtype: torch.dtype
    is_quantised: bool = False

    def __post_init__(self) -> None:
        if self.page_tokens not in SUPPORTED_PAGE_TOKENS:
            raise ValueError(
                f"a page of {self.page_tokens} tokens is not supported; "
                f"set --block-size to one of {SUPPORTED_PAGE_TOKENS}"
            )
        if not MIN_HEAD_SIZE <= self.head_size <= MAX_HEAD_SIZE or self.head_size % 8:
            raise ValueError(
                f"head size {self.head_size} is not supported: it must be a multiple of 8 "
                f"from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
            )
        if self.dtype not in SUPPORTED_DTYPES:
            raise ValueError(
                f"KV cache dtype {self.dtype} is not supported; choose one of {SUPPORTED_DTYPES}"
            )

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values as they are stored."""
        return QUANTISED_DTYPE if self.is_quantised else self.dtype

    @property
    def value_offset_bytes(self) -> int:
        return self.page_tokens * self.head_size * self.kv_dtype.itemsize

    @property
    def digest_offset_bytes(self) -> int:
        return 2 * self.value_offset_bytes

    @property
    def position_offset_bytes(self) -> int:
        return self.digest_offset_bytes + 2 * self.head_size * self.dtype.itemsize

    @property
    def code_words(self) -> int:
        """Words of an entry's code, 4 bits for each channel that is coded."""
        return -(-self.head_size // (CODED_SHARE * CODES_PER_WORD))

    @property
    def coded_channels(self) -> int:
        """Channels of a key that an index tells apart (R): a quarter, in whole words."""
        return CODES_PER_WORD * self.code_words

    @property
    def page_words(self) -> int:
        """Words of 32 bits that keys and values of a page take."""
        return self.digest_offset_bytes // 4

    def index_entries(self, entry_tokens: int) -> int:
        """Entries of an index page, of so many tokens each (E)."""
        return entries_of_page(self.page_words, self.code_words, entry_tokens)

    def index_tokens(self, entry_tokens: int) -> int:
        """Tokens that a page speaks for as an index, with so many to an entry (g E)."""
        return entry_tokens * self.index_entries(entry_tokens)

    @property
    def page_bytes(self) -> int:
        used_bytes = self.position_offset_bytes + 4 * self.page_tokens
        # vLLM sees a page as N tokens of whole elements
        alignment_bytes = max(PAGE_ALIGNMENT_BYTES, self.page_tokens * self.kv_dtype.itemsize)
        return -(-used_bytes // alignment_bytes) * alignment_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of a page per token: exact, and whole elements of keys."""
        return self.page_bytes // self.page_tokens


@dataclass(frozen=True)
class BlockLayout:
    """Which head-pages of the pool a block of the engine is.

    Blocks lie one behind another in the pool. Page `j` of head `h` of layer `l` in block `b` starts
    as head-page

        b * stride_pages + (l * H + h) * m + j

    Args:
        num_layers: that share the pool (L).
        num_heads: KV heads of this rank (H).
        head_pages: of each head (m).
        unused_pages: at the end of a block, where a block is longer because layers of other kinds
            use blocks of the same pool; no head has them.
    """

    num_layers: int
    num_heads: int
    head_pages: int = 1
    unused_pages: int = 0

    @property
    def used_pages(self) -> int:
        """Head-pages that a block is to its request (L * H * m)."""
        return self.num_layers * self.num_heads * self.head_pages

    @property
    def stride_pages(self) -> int:
        """Head-pages from a block to the next."""
        return self.used_pages + self.unused_pages

    def pages_of(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Head-pages of blocks, as their heads hold them, in the order of tokens.

        Args:
            block_ids: int32 [B].

        Returns:
            int32 [L, H, B * m].
        """
        page = torch.arange(self.used_pages, dtype=torch.int32, device=block_ids.device)
        by_head = page.view(self.num_layers, self.num_heads, 1, self.head_pages)
        return (by_head + (block_ids * self.stride_pages)[:, None]).flatten(2)


@dataclass(frozen=True)
class PagePool:
    """Every head-page of one worker, as typed views of one buffer. Views alias, nothing is copied.

    Args:
        raw: uint8 [P, page_bytes], contiguous.
        layout: where the fields are.
    """

    raw: torch.Tensor
    layout: PageLayout

    def __post_init__(self) -> None:
        assert self.raw.dtype == torch.uint8
        assert self.raw.is_contiguous()
        assert self.raw.shape[1] == self.layout.page_bytes

    @property
    def num_pages(self) -> int:
        return self.raw.shape[0]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[P, N, D], as stored."""
        layout = self.layout
        return self._field(0, (layout.page_tokens, layout.head_size), layout.kv_dtype)

    @cached_property
    def values(self) -> torch.Tensor:
        """[P, N, D], as stored."""
        layout = self.layout
        shape = (layout.page_tokens, layout.head_size)
        return self._field(layout.value_offset_bytes, shape, layout.kv_dtype)

    @cached_property
    def digests(self) -> torch.Tensor:
        """[P, 2, D], computed dtype: centre and radius of the page's keys."""
        layout = self.layout
        return self._field(layout.digest_offset_bytes, (2, layout.head_size), layout.dtype)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [P, N]: logical index of each token in its request."""
        layout = self.layout
        return self._field(layout.position_offset_bytes, (layout.page_tokens,), torch.int32)

    @cached_property
    def index_words(self) -> torch.Tensor:
        """int32 [P, W]: codes and marks of a page of an index."""
        return self._field(0, (self.layout.page_words,), torch.int32)

    def _field(self, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size_bytes = dtype.itemsize
        for extent in shape:
            size_bytes *= extent
        field = self.raw[:, offset_bytes : offset_bytes + size_bytes].view(dtype)
        return field.unflatten(1, shape)

    def poison(self, page_ids: torch.Tensor | None = None) -> None:
        """Fill free pages with NaN (positions with a huge index), so that a read of one shows.

        Args:
            page_ids: int [M], the pages; None for all. Mutates them.
        """
        selection = slice(None) if page_ids is None else page_ids.long()
        self.keys[selection] = torch.nan
        self.values[selection] = torch.nan
        self.digests[selection] = torch.nan
        self.positions[selection] = torch.iinfo(torch.int32).max
