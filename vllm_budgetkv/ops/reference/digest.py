"""Reference of `digest`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.tokens import locate_pages

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def digest(heads: PagedHeads) -> None:
    """See `vllm_budgetkv.ops.digest.digest`."""
    (pool, table, lens), page_tokens = heads, heads.page_tokens
    held = locate_pages(lens, page_tokens, heads.width_pages)
    pages = table[held].long()
    first_token = torch.arange(heads.width_pages, device=table.device) * page_tokens
    counts = (lens[:, None] - first_token)[held].clamp(max=page_tokens)

    valid = (torch.arange(page_tokens, device=table.device) < counts[:, None])[..., None]
    keys = pool.keys[pages].float()
    highest = keys.masked_fill(~valid, -torch.inf).amax(dim=1)
    lowest = keys.masked_fill(~valid, torch.inf).amin(dim=1)
    centre = (highest + lowest) / 2
    deviation = (keys - centre[:, None]).abs().masked_fill(~valid, 0.0)
    radius = deviation.sum(dim=1) / counts[:, None]
    pool.digests[pages] = torch.stack((centre, radius), dim=1).to(pool.layout.dtype)
