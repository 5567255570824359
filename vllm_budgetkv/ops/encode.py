"""`encode`: build the index of one request from the keys that host memory keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.require import require, require_recalls, require_tier

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer


def encode(
    slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool, energy: torch.Tensor
) -> None:
    """Write four bits for a quarter of the channels of the keys that heads recall, in one layer.

    A page has E entries for `entry_tokens` consecutive tokens each, which stand for the mean of
    their keys, summed from the first on and rounded to the digests' dtype. It tells those R
    channels apart that move logits most: with the largest energy times variance over its entries,
    of equals the lower ones. With the mean m of a channel, and its step s of 0.3352 deviations (the
    best of a uniform quantiser of 16 levels for a Gaussian: Max, 1960,
    https://doi.org/10.1109/TIT.1960.1057548), both rounded to that dtype, the code of k is
    floor((k - m) / s + 8), from 0 to 15. Arithmetic is float32.

    Keys that were rotated to their positions differ most where queries hardly look, in fast pairs
    of channels, so a few channels of many bits say more than all with few.

    Args:
        slot: of the request.
        tier: one layer of all slots; read where the heads' tokens are.
        recalls: of the same layer.
        pool: its index pages are mutated, codes and digest; codes behind the last token are not,
            nor are marks, see `mark`.
        energy: float32 [H, D], mean square of the queries' channels.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a page or block id is out of range.
    """
    require_tier(tier, tier.blocks.shape[0])
    num_heads, head_size = tier.tokens.shape[1], tier.tokens.shape[-1]
    require_recalls(recalls, (tier.blocks.shape[0], num_heads))
    require("energy", energy, torch.float32, (num_heads, head_size))
    match backend.of(pool.raw):
        case "reference":
            encode_reference(slot, tier, recalls, pool, energy)
        case "triton":
            from vllm_budgetkv.ops.triton.encode import encode as encode_triton

            encode_triton(slot, tier, recalls, pool, energy)
        case "cpp":
            extension.load()
            known = (recalls.table, recalls.num_tokens, recalls.entry_tokens)
            torch.ops.budgetkv.encode(
                *(tier.tokens, tier.blocks[slot], *(field[slot] for field in known)),
                *(pool.index_words, pool.layout.code_words, pool.digests, energy),
            )
