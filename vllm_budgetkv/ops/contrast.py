"""`contrast`: how unlike the other keys of its head each key is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.contrast import contrast as contrast_reference
from vllm_budgetkv.ops.require import require_request, require_width

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def contrast(heads: PagedHeads, max_tokens: int) -> torch.Tensor:
    """1 - cos(key, mean of the normalised keys) of one request and layer, in float32.

    The mean is over all keys that the head holds, rotated as they are stored. Keys are read where
    they lie: a copy of them in float32 would be twice the cache of the layer.

    Based on KeyDiff (https://arxiv.org/abs/2504.15364); shifted by 1, so that it is 0 or more.

    Args:
        heads: of one request.
        max_tokens: n, width of the result, at least the largest of `lens`.

    Returns:
        float32 [H, n] from 0 to 2, 0 beyond `lens`. Nothing is mutated.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    require_request(heads)
    require_width(max_tokens, heads)
    match backend.of(heads.table):
        case "reference":
            return contrast_reference(heads, max_tokens)
        case "triton":
            from vllm_budgetkv.ops.triton.contrast import contrast as contrast_triton

            return contrast_triton(heads, max_tokens)
        case "cpp":
            extension.load()
            tables = (heads.table, heads.lens)
            found: torch.Tensor = torch.ops.budgetkv.contrast(heads.pool.keys, *tables, max_tokens)
            return found
