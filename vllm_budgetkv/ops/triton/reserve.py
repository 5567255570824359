"""`reserve` in Triton: one launch for all layers, a program per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Stacks, Tables, require_dense

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads


def reserve(heads: PagedHeads, stack: FreeStack, rows: BatchRows) -> None:
    """See `vllm_budgetkv.ops.reserve.reserve`.

    A GPU cannot refuse a row whose stack or table is too small: the row is left as it was.
    """
    slots, shared, num_heads = rows.slots, rows.shared, heads.num_heads
    num_rows = slots.shape[0]
    if num_rows == 0 or num_heads == 0:
        return
    require_dense(slots=slots, shared=shared)
    reserve_kernel[(num_rows,)](
        Tables.of(heads),
        Stacks.of(stack),
        slots,
        shared,
        num_heads,
        heads.width_pages,
        PAGE_TOKENS=heads.page_tokens,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
    )


@triton.jit
def reserve_kernel(
    tables: tl.tuple,
    stacks: tl.tuple,
    slots: tl.tensor,
    shared: tl.tensor,
    num_heads: tl.tensor,
    width_pages: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
) -> None:
    """Grid [R]: the running count of heads that lack a page says which of the stack is whose."""
    row = tl.program_id(0)
    if tl.load(shared + row).to(tl.int32) == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    is_head = head < num_heads
    held = tl.load(tables.lens + slot * tables.lens_slot_stride + head, mask=is_head, other=1)
    entry = held // PAGE_TOKENS
    lacks = is_head & (held % PAGE_TOKENS == 0)
    rank = tl.cumsum(lacks.to(tl.int32), 0)
    num_free = tl.load(stacks.heights + slot)
    left = num_free - tl.sum(lacks.to(tl.int32))
    fits = (left >= 0) & (tl.max(tl.where(lacks, entry, 0)) < width_pages)
    lacks = (head < tl.where(fits, num_heads, 0)) & (held % PAGE_TOKENS == 0)
    page = tl.load(stacks.pages + slot * stacks.slot_stride + num_free - rank, mask=lacks, other=-1)
    heads = tables.table + slot * tables.slot_stride + head.to(tl.int64) * tables.head_stride
    tl.store(heads + entry, page, mask=lacks)
    tl.store(stacks.heights + slot, tl.where(fits, left, num_free))
