"""Reference of `load`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.ops.reference.host_places import host_places

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def load(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """See `vllm_budgetkv.ops.load.load`."""
    for tokens, blocks, offsets in host_places(rows, tier):
        for part, out in enumerate((key, value)):
            out[tokens] = tier.tokens[blocks, :, part, offsets]
