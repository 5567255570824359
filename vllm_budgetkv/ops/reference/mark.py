"""Reference of `mark`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.tokens import locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, RecallHeads

WORD_BITS = 32


def mark(slot: int, heads: PagedHeads, recalls: RecallHeads) -> None:
    """See `vllm_budgetkv.ops.mark.mark`."""
    pool, entries = heads.pool, heads.pool.layout.index_tokens
    of_slot = heads._replace(table=heads.table[slot], lens=heads.lens[slot])
    pages, offsets, held = locate_tokens(of_slot, of_slot.capacity_tokens)
    for head, num_tokens in enumerate(recalls.num_tokens[slot].tolist()):
        num_pages = -(-num_tokens // entries)
        is_held = torch.zeros(num_pages * entries, dtype=torch.bool, device=pages.device)
        first = int(recalls.num_recalled[slot, head])
        positions = pool.positions[pages[head], offsets[head]][first:][held[head][first:]].long()
        is_held[positions[(positions >= 0) & (positions < num_tokens)]] = True
        index = recalls.table[slot, head, :num_pages].long()
        pool.positions[index] = pack_bits(is_held.view(num_pages, entries), pool.positions.shape[1])


def pack_bits(bits: torch.Tensor, num_words: int) -> torch.Tensor:
    """int32 [n, words]: bits [n, e], the first in the lowest bit of the first word, then zeros."""
    padding = num_words * WORD_BITS - bits.shape[1]
    groups = torch.nn.functional.pad(bits.long(), (0, padding)).view(-1, num_words, WORD_BITS)
    words = (groups << torch.arange(WORD_BITS, device=bits.device)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_bits(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """bool [n, num_bits]: the bits of `pack_bits`."""
    bits = words.long()[..., None] >> torch.arange(WORD_BITS, device=words.device) & 1
    return bits.flatten(-2)[..., :num_bits].bool()
