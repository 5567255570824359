"""Reference of `load`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def load(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """See `vllm_budgetkv.ops.load.load`."""
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = rows.query_start[row : row + 2].tolist()
        first = int(rows.first_position[row])
        positions = torch.arange(first, first + end - start, device=key.device)
        positions = positions[positions < tier.blocks.shape[1] * tier.page_tokens]
        blocks = tier.blocks[slot, positions // tier.page_tokens].long()
        is_kept = blocks >= 0
        blocks, offsets = blocks[is_kept], (positions % tier.page_tokens)[is_kept]
        for part, out in enumerate((key, value)):
            out[start : start + len(positions)][is_kept] = tier.tokens[blocks, :, part, offsets]
