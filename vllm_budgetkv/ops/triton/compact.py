"""`compact` in Triton: one launch moves the survivors, a second frees the pages behind them.

Both know a page as int32 words, so that one kernel serves every cache dtype and moves are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE
from vllm_budgetkv.ops.triton.arguments import require_dense
from vllm_budgetkv.ops.triton.heads import Heads

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import FreeStack, PagedHeads

WORD_BYTES = 4
BLOCK_TOKENS = 512
# of a key or a value, moved by one program: two sectors of memory
BLOCK_WORDS = 16
BLOCK_PAGES = 128
BLOCK_POISON_WORDS = 1024
NUM_WARPS = 8

HUGE_POSITION: tl.constexpr = tl.constexpr(2**31 - 1)
# two of a float of 16 bits, four of one of 8
_NAN_WORDS = {
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC07FC0,
    torch.float16: 0x7E007E00,
    QUANTISED_DTYPE: 0x7F7F7F7F,
}


class Words(NamedTuple):
    """The pool as int32 words, and in which word of a page each field starts."""

    data: Any
    page_words: Any
    token_words: Any
    value: Any
    digest: Any
    position: Any

    @classmethod
    def of(cls, pool: PagePool) -> Words:
        layout = pool.layout
        return cls(
            pool.raw.view(torch.int32),
            layout.page_bytes // WORD_BYTES,
            layout.head_size * layout.kv_dtype.itemsize // WORD_BYTES,
            layout.value_offset_bytes // WORD_BYTES,
            layout.digest_offset_bytes // WORD_BYTES,
            layout.position_offset_bytes // WORD_BYTES,
        )


class Survivors(NamedTuple):
    """Which tokens stay, uint8 [H, n]."""

    keep: Any
    stride: Any


class Counts(NamedTuple):
    """What the first launch leaves for the second, which overwrites what it is derived from."""

    survivors: Any
    freed_pages: Any
    num_free: Any

    @classmethod
    def empty(cls, num_heads: int, device: torch.device) -> Counts:
        scratch = torch.empty(2 * num_heads + 1, dtype=torch.int32, device=device)
        return cls(scratch[:num_heads], scratch[num_heads:-1], scratch[-1:])


def compact(keep: torch.Tensor, heads: PagedHeads, stack: FreeStack, poison: bool) -> None:
    """See `vllm_budgetkv.ops.compact.compact`. H may run over the heads of several layers.

    A GPU cannot refuse: the stack must have room for the freed pages, and tables name their pages.
    """
    num_heads, layout = heads.num_heads, heads.pool.layout
    if num_heads == 0:
        return
    words, rows = Words.of(heads.pool), Heads.of(heads)
    require_dense(keep=keep, free_pages=stack.free_pages)
    counts = Counts.empty(num_heads, keep.device)
    slices = triton.cdiv(words.token_words, BLOCK_WORDS)
    move_kernel[(2 * slices + 1, num_heads)](
        Survivors(keep.view(torch.uint8), keep.stride(0)),
        words,
        rows,
        counts,
        stack.num_free,
        PAGE_TOKENS=layout.page_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_WORDS=BLOCK_WORDS,
        num_warps=NUM_WARPS,
    )
    free_kernel[(num_heads,)](
        words,
        rows,
        counts,
        *stack,
        num_heads,
        PAGE_TOKENS=layout.page_tokens,
        NAN_WORDS=(_NAN_WORDS[layout.kv_dtype], _NAN_WORDS[layout.dtype]),
        POISON=poison,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_PAGES=BLOCK_PAGES,
        BLOCK_WORDS=BLOCK_POISON_WORDS,
        num_warps=4,
    )


@triton.jit
def move_kernel(
    survivors: tl.tuple,
    words: tl.tuple,
    heads: tl.tuple,
    counts: tl.tuple,
    num_free: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """Grid [slices, H]: moves some words of all survivors of a head.

    The first program of a head moves positions and counts; the others move a slice of
    the keys or of the values each. No two programs touch the same word.

    One program moves a slice of the whole head, in ascending tiles of tokens. A target never lies
    behind its source, so the stores of a tile hit only slots up to its own last source: no source
    of a later tile is lost. Within a tile, whose targets may be another thread's sources, all
    loads come before the barrier and all stores behind it.
    """
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tokens = tl.load(heads.lens + head * heads.lens_stride)
    table = heads.table + head * heads.stride
    keep = survivors.keep + head * survivors.stride
    kept = num_tokens * 0
    for first in range(0, num_tokens, BLOCK_TOKENS):
        source = first + tl.arange(0, BLOCK_TOKENS)
        stays = tl.load(keep + source, mask=source < num_tokens, other=0).to(tl.int32)
        target = kept + tl.cumsum(stays, 0) - stays
        moves = (stays != 0) & (target != source)
        from_page = tl.load(table + source // PAGE_TOKENS, mask=moves, other=0).to(tl.int64)
        to_page = tl.load(table + target // PAGE_TOKENS, mask=stays != 0, other=0).to(tl.int64)
        from_page, to_page = from_page * words.page_words, to_page * words.page_words
        from_slot, to_slot = source % PAGE_TOKENS, target % PAGE_TOKENS
        if part == 0:
            positions = words.data + words.position
            position = tl.load(positions + from_page + from_slot, mask=moves, other=0)
            tl.debug_barrier()
            tl.store(positions + to_page + to_slot, position, mask=moves)
        else:
            from_word = from_page + from_slot * words.token_words
            to_word = to_page + to_slot * words.token_words
            _move_slice(words, part - 1, from_word, to_word, moves, BLOCK_WORDS)
        kept += tl.sum(stays)

    if part == 0:
        tl.store(counts.survivors + head, kept)
        freed = tl.cdiv(num_tokens, PAGE_TOKENS) - tl.cdiv(kept, PAGE_TOKENS)
        tl.store(counts.freed_pages + head, freed)
        if head == 0:
            tl.store(counts.num_free, tl.load(num_free))


@triton.jit
def _move_slice(
    words: tl.tuple,
    part: tl.tensor,
    from_word: tl.tensor,
    to_word: tl.tensor,
    moves: tl.tensor,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """Move one slice of the keys, or of the values, of a tile of tokens."""
    slices = tl.cdiv(words.token_words, BLOCK_WORDS)
    column = part % slices * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    field = words.data + (part >= slices).to(tl.int64) * words.value + column
    mask = moves[:, None] & (column < words.token_words)[None, :]
    moved = tl.load(field[None, :] + from_word[:, None], mask=mask, other=0)
    tl.debug_barrier()
    tl.store(field[None, :] + to_word[:, None], moved, mask=mask)


@triton.jit
def free_kernel(
    words: tl.tuple,
    heads: tl.tuple,
    counts: tl.tuple,
    free_pages: tl.tensor,
    num_free: tl.tensor,
    num_heads: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    NAN_WORDS: tl.constexpr,
    POISON: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """Grid [H]: pushes the pages behind a head's survivors above those of the heads before it."""
    head = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, BLOCK_HEADS)
    freed = tl.load(counts.freed_pages + every, mask=every < num_heads, other=0)
    height = tl.load(counts.num_free)
    bottom = height + tl.sum(tl.where(every < head, freed, 0))
    kept = tl.load(counts.survivors + head)
    first_page = tl.cdiv(kept, PAGE_TOKENS)
    num_freed = tl.load(counts.freed_pages + head)

    table = heads.table + head * heads.stride
    if POISON:
        if kept % PAGE_TOKENS != 0:
            last = tl.load(table + first_page - 1)
            _poison(words, last, kept % PAGE_TOKENS, PAGE_TOKENS, NAN_WORDS, BLOCK_WORDS)
        for entry in range(first_page, first_page + num_freed):
            _poison(words, tl.load(table + entry), 0, PAGE_TOKENS, NAN_WORDS, BLOCK_WORDS)
    for first in range(0, num_freed, BLOCK_PAGES):
        index = first + tl.arange(0, BLOCK_PAGES)
        is_freed = index < num_freed
        page = tl.load(table + first_page + index, mask=is_freed, other=-1)
        tl.store(free_pages + bottom + index, page, mask=is_freed)
        # every thread has read the entries
        tl.debug_barrier()
        tl.store(table + first_page + index, tl.full([BLOCK_PAGES], -1, tl.int32), mask=is_freed)
    tl.store(heads.lens + head * heads.lens_stride, kept)
    if head == 0:
        tl.store(num_free, height + tl.sum(freed))


@triton.jit
def _poison(
    words: tl.tuple,
    page: tl.tensor,
    first_slot: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    NAN_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """Fill the slots of a page from `first_slot`; from slot 0 its digest too."""
    start = words.data + page.to(tl.int64) * words.page_words
    for first in range(0, words.position + PAGE_TOKENS, BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        slot = tl.where(word < words.value, word, word - words.value) // words.token_words
        slot = tl.where(word < words.digest, slot, 0)
        slot = tl.where(word < words.position, slot, word - words.position)
        # keys and values may be of another type than the digest
        content = tl.where(word < words.digest, NAN_WORDS[0], NAN_WORDS[1])
        content = tl.where(word < words.position, content, HUGE_POSITION)
        is_free = (slot >= first_slot) & (word < words.position + PAGE_TOKENS)
        tl.store(start + word, content, mask=is_free)
