"""Where in host memory the tokens of a batch are: what `store` and `load` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.ops.views import BatchRows, TierLayer


def host_places(
    rows: BatchRows, tier: TierLayer
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each row the tokens of the batch that have a block, their blocks and places in these."""
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = rows.query_start[row : row + 2].tolist()
        tokens = torch.arange(start, end, device=rows.slots.device)
        positions = int(rows.first_position[row]) + tokens - start
        is_inside = positions < tier.blocks.shape[1] * tier.page_tokens
        tokens, positions = tokens[is_inside], positions[is_inside]
        blocks = tier.blocks[slot, positions // tier.page_tokens].long()
        is_kept = blocks >= 0
        yield tokens[is_kept], blocks[is_kept], (positions % tier.page_tokens)[is_kept]
