"""`store` in Triton: one launch that writes the new tokens to host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Tokens, require_dense
from vllm_budgetkv.ops.triton.rows import count_blocks, find_row, first_block
from vllm_budgetkv.ops.triton.tier import Tier, find_keys

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, TierLayer

BLOCK_TOKENS = 16


def store(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """See `vllm_budgetkv.ops.store.store`.

    A GPU cannot refuse a slot or a block that is out of range: its tokens are left out.
    """
    num_rows, head_size = rows.slots.shape[0], key.shape[2]
    if num_rows == 0 or key.shape[0] == 0:
        return
    numbers = (rows.slots, rows.query_start, rows.first_position)
    require_dense(slots=numbers[0], query_start=numbers[1], first_position=numbers[2])
    store_kernel[(count_blocks(key.shape[0], num_rows, BLOCK_TOKENS), key.shape[1])](
        Tokens.of(key),
        Tokens.of(value),
        *numbers,
        Tier.of(tier),
        num_rows,
        tier.blocks.shape[0],
        TIER_TOKENS=tier.page_tokens,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=triton.next_power_of_2(head_size),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


@triton.jit
def store_kernel(
    key: tl.tuple,
    value: tl.tuple,
    slots: tl.tensor,
    query_start: tl.tensor,
    first_position: tl.tensor,
    tier: tl.tuple,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [blocks, H]: writes one block of a row's new tokens of one head."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = find_row(query_start, num_rows, block, BLOCK_TOKENS)
    if row < 0:
        return
    start = tl.load(query_start + row)
    num_tokens = tl.load(query_start + row + 1) - start
    slot = tl.load(slots + row).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    row_block = first_block(query_start, row, BLOCK_TOKENS)
    token = (block - row_block) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    position = tl.load(first_position + row) + token
    place, found = find_keys(tier, slot, head, position, token < num_tokens, TIER_TOKENS)
    channel = tl.arange(0, BLOCK_SIZE)
    mask = found[:, None] & (channel < HEAD_SIZE)[None, :]
    source = (start + token).to(tl.int64)[:, None]
    new_keys = key.data + source * key.stride + head * key.head_stride + channel[None, :]
    new_values = value.data + source * value.stride + head * value.head_stride + channel[None, :]
    target = tier.data + place[:, None] + channel[None, :]
    tl.store(target, tl.load(new_keys, mask=mask, other=0.0), mask=mask)
    tl.store(target + tier.part_stride, tl.load(new_values, mask=mask, other=0.0), mask=mask)
