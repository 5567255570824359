"""Reference of `contrast`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from vllm_budgetkv.ops.reference.tokens import locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def contrast(
    heads: PagedHeads, max_tokens: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See `vllm_budgetkv.ops.contrast.contrast`; computed and returned in `dtype`."""
    pages, offsets, held = locate_tokens(heads, max_tokens)
    keys = heads.pool.keys[pages, offsets].to(dtype).masked_fill(~held[..., None], 0.0)
    directions = normalize(keys, dim=-1)
    # keys that are not held are 0, so the sum points where the mean does
    anchors = normalize(directions.sum(dim=1), dim=-1)
    found = 1 - (directions @ anchors[..., None]).squeeze(-1)
    return found.masked_fill_(~held, 0.0)
