"""`load`: read tokens of a batch from host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.load import load as load_reference
from vllm_budgetkv.ops.require import require_moved

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def load(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """Read the keys and values of every row's tokens from the host blocks of its slot.

    What `store` wrote, bit for bit. A token whose slot has no block there is left as it is.

    Args:
        key: [T, H, D] as the tier keeps them, written; tokens and heads may lie apart.
        value: as `key`, written.
        rows: of the batch; `shared` is not read.
        tier: one layer of all slots.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot or a block id is out of range.
    """
    require_moved(key, value, rows, tier)
    match backend.of(key):
        case "reference":
            load_reference(key, value, rows, tier)
        case "triton":
            from vllm_budgetkv.ops.triton.load import load as load_triton

            load_triton(key, value, rows, tier)
        case "cpp":
            extension.load()
            numbers = (rows.slots, rows.query_start, rows.first_position)
            torch.ops.budgetkv.load(key, value, *numbers, *tier)
