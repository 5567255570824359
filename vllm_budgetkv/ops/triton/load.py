"""`load` in Triton: one launch that reads tokens from host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.ops.triton.move import move

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def load(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """See `vllm_budgetkv.ops.load.load`."""
    move(key, value, rows, tier, loads=True)
