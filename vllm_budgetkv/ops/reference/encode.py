"""Reference of `encode`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.layout import CODES_PER_WORD

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer

CODE_BITS, LEVELS = 4, 16
# the step between the levels of a uniform quantiser of 16 levels that loses least of a Gaussian,
# in units of its deviation (Max, 1960)
STEP = 0.3352


def encode(
    slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool, energy: torch.Tensor
) -> None:
    """See `vllm_budgetkv.ops.encode.encode`."""
    entries = pool.layout.index_tokens
    for head, num_tokens in enumerate(recalls.num_tokens[slot].tolist()):
        for first in range(0, num_tokens, entries):
            last = min(first + entries, num_tokens)
            positions = torch.arange(first, last, device=pool.raw.device)
            blocks = tier.blocks[slot, positions // tier.page_tokens].long()
            keys = tier.tokens[blocks, head, 0, positions % tier.page_tokens].float()
            page = int(recalls.table[slot, head, first // entries])
            encode_page(pool, page, keys, energy[head])


def encode_page(pool: PagePool, page: int, keys: torch.Tensor, energy: torch.Tensor) -> None:
    """Write one index page of the keys [e, D], by the channels that move logits most."""
    num_channels = pool.layout.coded_channels
    variance, mean = torch.var_mean(keys, dim=0, correction=0)
    order = (energy * variance).argsort(descending=True, stable=True)
    channels = order[:num_channels].sort().values
    pool.digests[page, 0] = mean
    pool.digests[page, 1, :num_channels] = STEP * variance[channels].sqrt()
    pool.digests[page, 1, num_channels : 2 * num_channels] = channels.to(pool.digests.dtype)
    mean, step, channels = read_digest(pool.digests[page], num_channels)
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    levels = ((keys[:, channels] - mean[channels]) / step + LEVELS / 2).floor()
    pool.codes[page, : len(keys)] = pack(levels.clamp(0, LEVELS - 1).int())


def read_digest(
    digest: torch.Tensor, num_channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [..., D], step [..., R] and channel [..., R] of index pages' digests [..., 2, D]."""
    mean, rest = digest.float().unbind(-2)
    return mean, rest[..., :num_channels], rest[..., num_channels : 2 * num_channels].long()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int32 [n, R / 8]: codes [n, R] of 4 bits, 8 to a word, the first in the lowest bits."""
    shifts = CODE_BITS * torch.arange(CODES_PER_WORD, device=codes.device)
    words = (codes.unflatten(1, (-1, CODES_PER_WORD)).long() << shifts).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int64 [..., R]: the codes of `pack`."""
    shifts = CODE_BITS * torch.arange(CODES_PER_WORD, device=words.device)
    return ((words.long()[..., None] >> shifts) & (LEVELS - 1)).flatten(-2)
