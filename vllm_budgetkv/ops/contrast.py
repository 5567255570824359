"""`contrast`: how unlike the other keys of its head each key is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.contrast import contrast as contrast_reference
from vllm_budgetkv.ops.require import require, require_width

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def contrast(
    pool: PagePool, table: torch.Tensor, lens: torch.Tensor, max_tokens: int
) -> torch.Tensor:
    """1 - cos(key, mean of the normalised keys) of one request and layer, in float32.

    The mean is over all keys that the head holds, rotated as they are stored. Keys are read where
    they lie: a copy of them in float32 would be twice the cache of the layer.

    Based on KeyDiff (https://arxiv.org/abs/2504.15364); shifted by 1, so that it is 0 or more.

    Args:
        pool: the head-pages.
        table: int32 [H, W], pages of each head.
        lens: int32 [H], tokens of each head.
        max_tokens: n, width of the result, at least the largest of `lens`.

    Returns:
        float32 [H, n] from 0 to 2, 0 beyond `lens`. Nothing is mutated.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    require("table", table, torch.int32, (None, None))
    require("lens", lens, torch.int32, (table.shape[0],))
    require_width(max_tokens, table, pool.layout.page_tokens)
    match backend.of(table):
        case "reference":
            return contrast_reference(pool, table, lens, max_tokens)
        case "triton":
            from vllm_budgetkv.ops.triton.contrast import contrast as contrast_triton

            return contrast_triton(pool, table, lens, max_tokens)
        case "cpp":
            extension.load()
            found: torch.Tensor = torch.ops.budgetkv.contrast(pool.keys, table, lens, max_tokens)
            return found
