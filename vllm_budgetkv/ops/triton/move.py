"""What `store` and `load` share in Triton: one launch that moves tokens to host memory or back."""

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


def move(
    key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer, *, loads: bool
) -> None:
    """Move the tokens of all rows.

    A GPU cannot refuse a slot or a block that is out of range: its tokens are left out.

    Args:
        key, value, rows, tier: see `vllm_budgetkv.ops.store.store` and `load`.
        loads: whether they come from host memory.
    """
    num_rows, head_size = rows.slots.shape[0], key.shape[2]
    if num_rows == 0 or key.shape[0] == 0:
        return
    numbers = (rows.slots, rows.query_start, rows.first_position)
    require_dense(slots=numbers[0], query_start=numbers[1], first_position=numbers[2])
    move_kernel[(count_blocks(key.shape[0], num_rows, BLOCK_TOKENS), key.shape[1])](
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
        LOADS=loads,
    )


@triton.jit
def move_kernel(
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
    LOADS: tl.constexpr,
) -> None:
    """Grid [blocks, H]: moves one block of a row's tokens of one head."""
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
    row_place = (start + token).to(tl.int64)[:, None]
    keys = key.data + row_place * key.stride + head * key.head_stride + channel[None, :]
    values = value.data + row_place * value.stride + head * value.head_stride + channel[None, :]
    kept_keys = tier.data + place[:, None] + channel[None, :]
    kept_values = kept_keys + tier.part_stride
    if LOADS:
        tl.store(keys, tl.load(kept_keys, mask=mask, other=0.0), mask=mask)
        tl.store(values, tl.load(kept_values, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(kept_keys, tl.load(keys, mask=mask, other=0.0), mask=mask)
        tl.store(kept_values, tl.load(values, mask=mask, other=0.0), mask=mask)
