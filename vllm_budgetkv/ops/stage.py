"""`stage`: copy blocks of host memory to pages, whole as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.stage import stage as stage_reference
from vllm_budgetkv.ops.require import require, require_tier

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import TierLayer


def stage(
    pages: torch.Tensor, pool: PagePool, slot: int, first_block: int, tier: TierLayer
) -> None:
    """Copy keys and values of blocks that follow one another of one request to pages.

    Page `i` of head `h` gets what block `first_block + i` of the slot keeps of it. Digests and
    positions of the pages are left as they are.

    Args:
        pages: int32 [H, W].
        pool: the head-pages; mutated.
        slot: of the request.
        first_block: first of W blocks that the slot has.
        tier: one layer of all slots; its blocks are as long as pages.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a page or a block id is out of range.
    """
    layout, num_heads = pool.layout, tier.tokens.shape[1]
    require_tier(tier, tier.blocks.shape[0])
    kept_shape = (None, num_heads, 2, layout.page_tokens, layout.head_size)
    require("tier.tokens", tier.tokens, layout.kv_dtype, kept_shape)
    require("pages", pages, torch.int32, (num_heads, None))
    match backend.of(pages):
        case "reference":
            stage_reference(pages, pool, slot, first_block, tier)
        case "triton":
            from vllm_budgetkv.ops.triton.stage import stage as stage_triton

            stage_triton(pages, pool, slot, first_block, tier)
        case "cpp":
            extension.load()
            blocks = tier.blocks[slot]
            torch.ops.budgetkv.stage(
                pool.keys, pool.values, pages, tier.tokens, blocks, first_block
            )
