"""Reference of `mark`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.index_pages import write_marks
from vllm_budgetkv.ops.reference.tokens import locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, RecallHeads


def mark(slot: int, heads: PagedHeads, recalls: RecallHeads) -> None:
    """See `vllm_budgetkv.ops.mark.mark`."""
    pool = heads.pool
    of_slot = heads._replace(table=heads.table[slot], lens=heads.lens[slot])
    pages, offsets, held = locate_tokens(of_slot, of_slot.capacity_tokens)
    for head, num_tokens in enumerate(recalls.num_tokens[slot].tolist()):
        entry_tokens = int(recalls.entry_tokens[slot, head])
        page_tokens = pool.layout.index_tokens(entry_tokens)
        num_pages = -(-num_tokens // page_tokens)
        is_held = torch.zeros(num_pages * page_tokens, dtype=torch.bool, device=pages.device)
        first = int(recalls.num_recalled[slot, head])
        positions = pool.positions[pages[head], offsets[head]][first:][held[head][first:]].long()
        is_held[positions[(positions >= 0) & (positions < num_tokens)]] = True
        index = recalls.table[slot, head, :num_pages].long()
        write_marks(pool, index, is_held.view(num_pages, page_tokens), entry_tokens)
