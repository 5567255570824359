"""`encode`: build the index of one request from the keys that host memory keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.require import require_recalls, require_tier

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer


def encode(slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool) -> None:
    """Write two bits per channel of the keys of every head that recalls, in one layer.

    A page holds the codes of E consecutive tokens around their own mean: with the mean m and step s
    of a channel over those tokens, s being 0.9957 of their deviation (the best step of a uniform
    quantiser of 4 levels for a Gaussian: Max, 1960, https://doi.org/10.1109/TIT.1960.1057548), both
    rounded to the cache's dtype, the code of k is floor((k - m) / s + 2), from 0 to 3, and says
    m + s (code - 1.5). Arithmetic is float32. Marks are not written, see `mark`.

    Args:
        slot: of the request.
        tier: one layer of all slots; read where the heads' tokens are.
        recalls: of the same layer.
        pool: its index pages are mutated, codes and digest; codes behind the last token are not.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a page or block id is out of range.
    """
    require_tier(tier, tier.blocks.shape[0])
    require_recalls(recalls, (tier.blocks.shape[0], tier.tokens.shape[1]))
    match backend.of(pool.raw):
        case "reference":
            encode_reference(slot, tier, recalls, pool)
        case "triton":
            from vllm_budgetkv.ops.triton.encode import encode as encode_triton

            encode_triton(slot, tier, recalls, pool)
        case "cpp":
            extension.load()
            known = (recalls.table[slot], recalls.num_tokens[slot])
            torch.ops.budgetkv.encode(
                tier.tokens, tier.blocks[slot], *known, pool.codes, pool.digests
            )
