"""Reference of `encode`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.index_pages import LEVELS, read_digest, write_codes

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer

# the step between the levels of a uniform quantiser of 16 levels that loses least of a Gaussian,
# in units of its deviation (Max, 1960)
STEP = 0.3352


def encode(
    slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool, energy: torch.Tensor
) -> None:
    """See `vllm_budgetkv.ops.encode.encode`."""
    for head, num_tokens in enumerate(recalls.num_tokens[slot].tolist()):
        entry_tokens = int(recalls.entry_tokens[slot, head])
        page_tokens = pool.layout.index_tokens(entry_tokens)
        for first in range(0, num_tokens, page_tokens):
            last = min(first + page_tokens, num_tokens)
            positions = torch.arange(first, last, device=pool.raw.device)
            blocks = tier.blocks[slot, positions // tier.page_tokens].long()
            keys = tier.tokens[blocks, head, 0, positions % tier.page_tokens]
            page = int(recalls.table[slot, head, first // page_tokens])
            means = average(keys, entry_tokens, pool.layout.dtype)
            encode_page(pool, page, means.float(), energy[head])


def average(keys: torch.Tensor, entry_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Means [e, D] of neighbouring keys [n, D], rounded to `dtype`: summed from the first on."""
    means = []
    for neighbours in keys.float().split(entry_tokens):
        total = neighbours[0]
        for key in neighbours[1:]:
            total = total + key
        means.append(total / len(neighbours))
    return torch.stack(means).to(dtype)


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
    write_codes(pool, page, levels.clamp(0, LEVELS - 1).int())
