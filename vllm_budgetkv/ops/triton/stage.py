"""`stage` in Triton: one launch that reads whole blocks of host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, require_dense
from vllm_budgetkv.ops.triton.tier import Tier

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import TierLayer

BLOCK_ELEMENTS = 1024


def stage(
    pages: torch.Tensor, pool: PagePool, slot: int, first_block: int, tier: TierLayer
) -> None:
    """See `vllm_budgetkv.ops.stage.stage`.

    A GPU cannot refuse a block that is out of range: its pages are left as they are.
    """
    num_heads, width = pages.shape
    if width == 0:
        return
    require_dense(pages=pages)
    layout = pool.layout
    part_elements = layout.page_tokens * layout.head_size
    stage_kernel[(width, num_heads)](
        pages,
        pages.stride(0),
        Pages.of(pool),
        Tier.of(tier),
        slot,
        first_block,
        PART_ELEMENTS=part_elements,
        BLOCK_ELEMENTS=min(BLOCK_ELEMENTS, triton.next_power_of_2(part_elements)),
    )


@triton.jit(do_not_specialize=["slot"])
def stage_kernel(
    staged: tl.tensor,
    staged_stride: tl.tensor,
    pages: tl.tuple,
    tier: tl.tuple,
    slot: tl.tensor,
    first_block: tl.tensor,
    PART_ELEMENTS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
) -> None:
    """Grid [W, H]: the keys and values of one page, which are dense in both places."""
    column, head = tl.program_id(0), tl.program_id(1)
    entry = first_block + column
    known = entry < tier.width_blocks
    where = tl.cast(slot, tl.int64) * tier.slot_stride + entry
    block = tl.load(tier.blocks + where, mask=known, other=-1)
    if (block < 0) | (block >= tier.num_blocks):
        return
    page = tl.load(staged + head * staged_stride + column)
    from_keys = tier.data + block.to(tl.int64) * tier.block_stride + head * tier.head_stride
    to_page = page.to(tl.int64) * pages.stride
    for first in range(0, PART_ELEMENTS, BLOCK_ELEMENTS):
        element = first + tl.arange(0, BLOCK_ELEMENTS)
        mask = element < PART_ELEMENTS
        keys = tl.load(from_keys + element, mask=mask)
        values = tl.load(from_keys + tier.part_stride + element, mask=mask)
        tl.store(pages.key + to_page + element, keys, mask=mask)
        tl.store(pages.value + to_page + element, values, mask=mask)
