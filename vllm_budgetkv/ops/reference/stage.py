"""Reference of `stage`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import TierLayer


def stage(
    pages: torch.Tensor, pool: PagePool, slot: int, first_block: int, tier: TierLayer
) -> None:
    """See `vllm_budgetkv.ops.stage.stage`."""
    blocks = tier.blocks[slot, first_block : first_block + pages.shape[1]].tolist()
    for column, block in zip(pages.long().unbind(1), blocks, strict=True):
        if not 0 <= block < len(tier.tokens):
            raise IndexError(f"block {block} of slot {slot}, but there are {len(tier.tokens)}")
        pool.keys[column], pool.values[column] = tier.tokens[block].to(pool.raw.device).unbind(1)
