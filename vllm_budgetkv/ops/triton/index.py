"""Index pages, as kernels take them: what a head knows of the tokens in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import require_dense

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads

CODES_PER_WORD: tl.constexpr = tl.constexpr(8)
CODE_BITS: tl.constexpr = tl.constexpr(4)
MAX_CODE: tl.constexpr = tl.constexpr(15)
WORD_BITS: tl.constexpr = tl.constexpr(32)


class Index(NamedTuple):
    """The fields of index pages, and the pages [S, H, I] and counts [S, H] of all heads.

    `word_stride` leads from page to page in their words, `stride` in digests.
    """

    words: Any
    digest: Any
    word_stride: Any
    stride: Any
    num_pages: Any
    table: Any
    slot_stride: Any
    head_stride: Any
    width_pages: Any
    num_tokens: Any
    num_recalled: Any
    entry_tokens: Any
    tokens_slot_stride: Any
    recalled_slot_stride: Any
    entry_slot_stride: Any

    @classmethod
    def of(cls, pool: PagePool, recalls: RecallHeads) -> Index:
        table, *counts = recalls
        named = zip(("num_tokens", "num_recalled", "entry_tokens"), counts, strict=True)
        require_dense(index=table, **dict(named))
        return cls(
            *(pool.index_words, pool.digests, pool.index_words.stride(0), pool.digests.stride(0)),
            *(pool.num_pages, table, table.stride(0), table.stride(1), table.shape[2]),
            *(*counts, *(count.stride(0) for count in counts)),
        )


@triton.jit
def find_shape(
    index: tl.tuple,
    slot: tl.tensor,
    head: tl.tensor,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Tokens of an entry of a head's index, entries of a page and its tokens.

    The arithmetic is that of `arithmetic/index_page.py`.
    """
    entry_tokens = tl.load(index.entry_tokens + slot * index.entry_slot_stride + head)
    entry_tokens = tl.maximum(entry_tokens, 1)
    entries = (WORD_BITS * PAGE_WORDS) // (WORD_BITS * NUM_WORDS + entry_tokens) // 8 * 8
    return entry_tokens, entries, entries * entry_tokens


@triton.jit
def count_tokens(
    index: tl.tuple, slot: tl.tensor, head: tl.tensor, page_tokens: tl.tensor
) -> tl.tensor:
    """Tokens that a head's index speaks for, as far as it has room."""
    num_tokens = tl.load(index.num_tokens + slot * index.tokens_slot_stride + head)
    return tl.minimum(num_tokens, index.width_pages * page_tokens)


@triton.jit
def find_page(
    index: tl.tuple, slot: tl.tensor, head: tl.tensor, entry: tl.tensor, mask: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """int64 pages at some entries of a head's index, and which of them are pages of the pool."""
    entries = index.table + slot * index.slot_stride + head * index.head_stride + entry
    page = tl.load(entries, mask=mask, other=-1)
    return page.to(tl.int64), (page >= 0) & (page < index.num_pages)


@triton.jit
def load_coded(
    digest: tl.tensor,
    number: tl.tensor,
    mask: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """float32 step and int32 channel of some of the channels that a digest tells apart."""
    steps = digest + HEAD_SIZE + number
    step = tl.load(steps, mask=mask, other=0.0).to(tl.float32)
    channel = tl.load(steps + NUM_WORDS * CODES_PER_WORD, mask=mask, other=0.0).to(tl.float32)
    # a page that was never written may name anything
    is_channel = (channel >= 0.0) & (channel < HEAD_SIZE)
    return step, tl.where(is_channel, channel, 0.0).to(tl.int32)
