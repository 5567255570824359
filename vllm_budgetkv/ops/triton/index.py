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

    `word_stride` leads from page to page in codes and marks, `stride` in digests.
    """

    codes: Any
    digest: Any
    marks: Any
    word_stride: Any
    stride: Any
    num_pages: Any
    table: Any
    slot_stride: Any
    head_stride: Any
    width_pages: Any
    num_tokens: Any
    num_recalled: Any
    tokens_slot_stride: Any
    recalled_slot_stride: Any

    @classmethod
    def of(cls, pool: PagePool, recalls: RecallHeads) -> Index:
        table, num_tokens, num_recalled = recalls
        require_dense(index=table, num_tokens=num_tokens, num_recalled=num_recalled)
        return cls(
            *(pool.codes, pool.digests, pool.positions),
            *(pool.codes.stride(0), pool.digests.stride(0), pool.num_pages),
            *(table, table.stride(0), table.stride(1), table.shape[2]),
            *(num_tokens, num_recalled, num_tokens.stride(0), num_recalled.stride(0)),
        )


@triton.jit
def count_tokens(
    index: tl.tuple, slot: tl.tensor, head: tl.tensor, INDEX_TOKENS: tl.constexpr
) -> tl.tensor:
    """Tokens that a head's index speaks for, as far as it has room."""
    num_tokens = tl.load(index.num_tokens + slot * index.tokens_slot_stride + head)
    return tl.minimum(num_tokens, index.width_pages * INDEX_TOKENS)


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
