"""Reference of `reserve`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.ops.reference.append import take_pages

if TYPE_CHECKING:
    import torch


def reserve(
    table: torch.Tensor,
    lens: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    slots: torch.Tensor,
    shared: torch.Tensor,
    page_tokens: int,
) -> None:
    """See `vllm_budgetkv.ops.reserve.reserve`."""
    for slot, is_shared in zip(slots.tolist(), shared.tolist(), strict=True):
        if not is_shared:
            continue
        for head, held_tokens in enumerate(lens[slot].tolist()):
            take_pages(table, free_pages, num_free, slot, head, held_tokens, 1, page_tokens)
