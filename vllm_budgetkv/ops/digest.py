"""`digest`: the box that summarises the keys of every page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.digest import digest as digest_reference
from vllm_budgetkv.ops.require import require_request

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def digest(heads: PagedHeads) -> None:
    """Write centre and radius of the keys of every page of one request and layer.

    Per channel, over the valid tokens of a page: centre = (max + min) / 2 and
    radius = mean |k - centre|. Computed in float32, stored in the computed dtype.

    Based on ArkVale (NeurIPS 2024, https://nips.cc/virtual/2024/poster/96635). The mean deviation
    makes the box tighter than min/max would, so it ranks pages and does not bound their keys.

    Args:
        heads: of one request; the digests of the pages in use are mutated.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_request(heads)
    match backend.of(heads.table):
        case "reference":
            digest_reference(heads)
        case "triton":
            from vllm_budgetkv.ops.triton.digest import digest as digest_triton

            digest_triton(heads)
        case "cpp":
            extension.load()
            pool = heads.pool
            torch.ops.budgetkv.digest(pool.keys, pool.digests, heads.table, heads.lens)
