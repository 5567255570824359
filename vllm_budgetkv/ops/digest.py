"""`digest`: the box that summarises the keys of every page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.digest import digest as digest_reference
from vllm_budgetkv.ops.require import require

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def digest(pool: PagePool, table: torch.Tensor, lens: torch.Tensor) -> None:
    """Write centre and radius of the keys of every page of one request and layer.

    Per channel, over the valid tokens of a page: centre = (max + min) / 2 and
    radius = mean |k - centre|. Computed in float32, stored in the cache dtype.

    Based on ArkVale (NeurIPS 2024, https://nips.cc/virtual/2024/poster/96635). The mean deviation
    makes the box tighter than min/max would, so it ranks pages and does not bound their keys.

    Args:
        pool: its digests of the pages in use are mutated.
        table: int32 [H, W], pages of each head.
        lens: int32 [H], tokens of each head.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("table", table, torch.int32, (None, None))
    require("lens", lens, torch.int32, (table.shape[0],))
    match backend.of(table):
        case "reference":
            digest_reference(pool, table, lens)
        case "triton":
            from vllm_budgetkv.ops.triton.digest import digest as digest_triton

            digest_triton(pool, table, lens)
        case "cpp":
            extension.load()
            torch.ops.budgetkv.digest(pool.keys, pool.digests, table, lens)
