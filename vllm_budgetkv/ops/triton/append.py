"""`append` in Triton: one launch that pops pages and writes the new tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, Stacks, Tables, Tokens, require_dense
from vllm_budgetkv.ops.triton.arrival import arrives_last, counters
from vllm_budgetkv.ops.triton.rows import count_blocks, find_row, first_block

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads

BLOCK_TOKENS = 16


class Rows(NamedTuple):
    """What each row appends; `arrivals` counts its programs."""

    slots: Any
    query_start: Any
    first_position: Any
    shared: Any
    arrivals: Any
    num_rows: Any


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: PagedHeads,
    stack: FreeStack,
    rows: BatchRows,
) -> None:
    """See `vllm_budgetkv.ops.append.append`.

    A GPU cannot refuse a row whose stack or table is too small: the row is left as it was.
    """
    num_rows, num_heads, layout = rows.slots.shape[0], heads.num_heads, heads.pool.layout
    if num_rows == 0 or key.shape[0] == 0:
        return
    require_dense(**rows._asdict())
    append_kernel[(count_blocks(key.shape[0], num_rows, BLOCK_TOKENS), num_heads)](
        Tokens.of(key),
        Tokens.of(value),
        Pages.of(heads.pool),
        Tables.of(heads),
        Stacks.of(stack),
        Rows(*rows, counters(num_rows, key.device), num_rows),
        capacity_tokens=heads.capacity_tokens,
        NUM_HEADS=num_heads,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


@triton.jit
def append_kernel(
    key: tl.tuple,
    value: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    stacks: tl.tuple,
    rows: tl.tuple,
    capacity_tokens: tl.tensor,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [blocks, H]: writes one block of tokens of one head.

    Each program works out on its own which pages of the stack are its head's, from the lengths of
    all heads. The row's last program then writes the new lengths, which the others have read.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    row = find_row(rows.query_start, rows.num_rows, block, BLOCK_TOKENS)
    if row < 0:
        return
    start = tl.load(rows.query_start + row)
    new_tokens = tl.load(rows.query_start + row + 1) - start
    if new_tokens <= 0:
        return
    slot = tl.load(rows.slots + row).to(tl.int64)
    row_block = first_block(rows.query_start, row, BLOCK_TOKENS)
    num_blocks = first_block(rows.query_start, row + 1, BLOCK_TOKENS) - row_block

    # what every head lacks, and what the heads before this one pop
    heads = tl.arange(0, BLOCK_HEADS)
    all_lens = tables.lens + slot * tables.lens_slot_stride + heads
    held = tl.load(all_lens, mask=heads < NUM_HEADS, other=0)
    lacks = tl.cdiv(held + new_tokens, PAGE_TOKENS) - tl.cdiv(held, PAGE_TOKENS)
    pops = tl.load(rows.shared + row).to(tl.int32)
    lacks = tl.where(heads < NUM_HEADS, lacks, 0) * pops
    num_free = tl.load(stacks.heights + slot)
    left = num_free - tl.sum(lacks)
    fits = (left >= 0) & (tl.max(held) + new_tokens <= capacity_tokens)

    token = (block - row_block) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_new = token < tl.where(fits, new_tokens, 0)
    head_held = tl.sum(tl.where(heads == head, held, 0))
    top = num_free - 1 - tl.sum(tl.where(heads < head, lacks, 0))
    entry, offset = (head_held + token) // PAGE_TOKENS, (head_held + token) % PAGE_TOKENS
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride + entry
    first_popped = tl.where(pops != 0, tl.cdiv(head_held, PAGE_TOKENS), capacity_tokens)
    stack = stacks.pages + slot * stacks.slot_stride + top - (entry - first_popped)
    popped = tl.load(stack, mask=is_new & (entry >= first_popped), other=-1)
    page = tl.load(entries, mask=is_new & (entry < first_popped), other=-1)
    page = tl.where(entry >= first_popped, popped, page)
    # a page is new with its first token
    tl.store(entries, page, mask=is_new & (entry >= first_popped) & (offset == 0))

    first_position = tl.load(rows.first_position + row)
    is_new = is_new & (page >= 0)
    _write(key, value, pages, start, token, head, page, offset, is_new, HEAD_SIZE, BLOCK_SIZE)
    word = page.to(tl.int64) * pages.word_stride + offset
    tl.store(pages.position + word, first_position + token, mask=is_new)
    if arrives_last(rows.arrivals + row, num_blocks * NUM_HEADS):
        tl.store(all_lens, held + new_tokens, mask=heads < tl.where(fits, NUM_HEADS, 0))
        tl.store(stacks.heights + slot, tl.where(fits, left, num_free))


@triton.jit
def _write(
    key: tl.tuple,
    value: tl.tuple,
    pages: tl.tuple,
    start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    page: tl.tensor,
    offset: tl.tensor,
    is_new: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Store the keys and values of one head's tokens at slots `offset` of pages `page`."""
    channel = tl.arange(0, BLOCK_SIZE)
    mask = is_new[:, None] & (channel < HEAD_SIZE)[None, :]
    source = (start + token).to(tl.int64)[:, None]
    target = (page.to(tl.int64) * pages.stride + offset * HEAD_SIZE)[:, None] + channel[None, :]
    new_keys = key.data + source * key.stride + head * key.head_stride + channel[None, :]
    new_values = value.data + source * value.stride + head * value.head_stride + channel[None, :]
    tl.store(pages.key + target, tl.load(new_keys, mask=mask, other=0.0), mask=mask)
    tl.store(pages.value + target, tl.load(new_values, mask=mask, other=0.0), mask=mask)
