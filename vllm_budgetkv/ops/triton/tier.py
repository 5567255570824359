"""The host memory of a layer, as kernels take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import require_dense

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import TierLayer


class Tier(NamedTuple):
    """Keys and values [B, H, 2, N, D], whose last stride is 1, and block tables [S, M]."""

    data: Any
    block_stride: Any
    head_stride: Any
    part_stride: Any
    token_stride: Any
    num_blocks: Any
    blocks: Any
    slot_stride: Any
    width_blocks: Any

    @classmethod
    def of(cls, tier: TierLayer) -> Tier:
        tokens, blocks = tier
        require_dense(tokens=tokens, blocks=blocks)
        block, head, part, token, _ = tokens.stride()
        width = (blocks.stride(0), blocks.shape[1])
        return cls(tokens, block, head, part, token, tokens.shape[0], blocks, *width)


@triton.jit
def find_keys(
    tier: tl.tuple,
    slot: tl.tensor,
    head: tl.tensor,
    position: tl.tensor,
    mask: tl.tensor,
    TIER_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the keys of one head's tokens start, and which of them have a block.

    A value lies `part_stride` behind its key.
    """
    entry = position // TIER_TOKENS
    mask = mask & (position >= 0) & (entry < tier.width_blocks)
    block = tl.load(tier.blocks + slot * tier.slot_stride + entry, mask=mask, other=-1)
    found = (block >= 0) & (block < tier.num_blocks)
    place = block.to(tl.int64) * tier.block_stride + head * tier.head_stride
    return place + position % TIER_TOKENS * tier.token_stride, found
