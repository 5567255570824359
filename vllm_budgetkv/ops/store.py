"""`store`: write the new tokens of a batch to host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.store import store as store_reference
from vllm_budgetkv.ops.require import require_moved

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def store(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """Write the keys and values of every row's new tokens to the host blocks of its slot.

    A token's place follows from its position. One whose slot has no block there is left out.

    Args:
        key: [T, H, D] as the tier keeps them; tokens and heads may lie apart.
        value: as `key`.
        rows: of the batch; `shared` is not read.
        tier: one layer of all slots; its tokens are mutated.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot or a block id is out of range.
    """
    require_moved(key, value, rows, tier)
    match backend.of(key):
        case "reference":
            store_reference(key, value, rows, tier)
        case "triton":
            from vllm_budgetkv.ops.triton.store import store as store_triton

            store_triton(key, value, rows, tier)
        case "cpp":
            extension.load()
            numbers = (rows.slots, rows.query_start, rows.first_position)
            torch.ops.budgetkv.store(key, value, *numbers, *tier)
