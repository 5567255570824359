"""Reference of `encode`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.layout import CODES_PER_WORD

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer

# the step between the levels of a uniform quantiser of 4 levels that loses least of a Gaussian,
# in units of its deviation (Max, 1960)
STEP = 0.9957


def encode(slot: int, tier: TierLayer, heads: RecallHeads, pool: PagePool) -> None:
    """See `vllm_budgetkv.ops.encode.encode`."""
    entries = pool.layout.index_tokens
    for head, num_tokens in enumerate(heads.num_tokens[slot].tolist()):
        for first in range(0, num_tokens, entries):
            last = min(first + entries, num_tokens)
            positions = torch.arange(first, last, device=pool.raw.device)
            blocks = tier.blocks[slot, positions // tier.page_tokens].long()
            keys = tier.tokens[blocks, head, 0, positions % tier.page_tokens].float()
            page = int(heads.table[slot, head, first // entries])
            mean = keys.mean(dim=0)
            step = STEP * (keys - mean).square().mean(dim=0).sqrt()
            pool.digests[page, 0], pool.digests[page, 1] = mean, step
            mean, step = pool.digests[page].float()
            smallest = torch.finfo(torch.float32).tiny
            codes = ((keys - mean) / step.clamp(min=smallest) + 2).floor().clamp(0, 3).int()
            pool.codes[page, : len(positions)] = pack(codes, pool.layout.code_words)


def pack(codes: torch.Tensor, num_words: int) -> torch.Tensor:
    """int32 [n, W]: codes [n, D] of 2 bits, 16 to a word, the first in the lowest bits."""
    padding = num_words * CODES_PER_WORD - codes.shape[1]
    groups = torch.nn.functional.pad(codes, (0, padding)).unflatten(1, (num_words, -1)).long()
    shifts = 2 * torch.arange(CODES_PER_WORD, device=codes.device)
    words = (groups << shifts).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: torch.Tensor, head_size: int) -> torch.Tensor:
    """int64 [n, D]: the codes of `pack`."""
    shifts = 2 * torch.arange(CODES_PER_WORD, device=words.device)
    return ((words.long()[..., None] >> shifts) & 3).flatten(-2)[..., :head_size]
