"""Reference of `reserve`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.ops.reference.append import take_pages

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads


def reserve(heads: PagedHeads, stack: FreeStack, rows: BatchRows) -> None:
    """See `vllm_budgetkv.ops.reserve.reserve`."""
    for slot, is_shared in zip(rows.slots.tolist(), rows.shared.tolist(), strict=True):
        if not is_shared:
            continue
        for head in range(heads.num_heads):
            take_pages(heads, stack, slot, head, 1)
