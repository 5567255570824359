"""Reference of `recall`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.index_pages import LEVELS, read_codes, read_digest, read_marks

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, RecallHeads, TierLayer


def recall(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    recalls: RecallHeads,
    tier: TierLayer,
    scale: float,
    moved: torch.Tensor,
) -> None:
    """See `vllm_budgetkv.ops.recall.recall`."""
    pool, page_tokens = heads.pool, heads.page_tokens
    queries = query.float().unflatten(1, (heads.num_heads, -1))
    for row, slot in enumerate(rows.slots.tolist()):
        for head in range(heads.num_heads):
            count = int(recalls.num_recalled[slot, head])
            if count == 0 or rows.query_start[row] == rows.query_start[row + 1]:
                continue
            num_tokens = int(recalls.num_tokens[slot, head])
            entry_tokens = int(recalls.entry_tokens[slot, head])
            num_pages = -(-num_tokens // pool.layout.index_tokens(entry_tokens))
            index = recalls.table[slot, head, :num_pages].long()
            found = look_up(queries[row, head], pool, index, entry_tokens, scale)
            mass, is_held = (of_pages[..., :num_tokens] for of_pages in found)
            mass = mass.softmax(dim=-1).sum(dim=0)
            wanted = best(mass.masked_fill(is_held, -1.0), count)
            pages = heads.table[slot, head, : count // page_tokens].long()
            moved[slot, head] += swap(pool, pages, wanted, tier, slot, head)


def look_up(
    queries: torch.Tensor, pool: PagePool, pages: torch.Tensor, entry_tokens: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an index says of the n tokens that its pages have room for.

    Args:
        queries: float32 [G, D], of the query heads of one KV head.
        pool: with the index pages.
        pages: int64 [I], the head's index pages.
        entry_tokens: tokens of an entry.
        scale: of the logits.

    Returns:
        logits: float32 [G, n]; tokens of an entry have the same.
        is_held: bool [n], tokens that the head holds on the device.
    """
    mean, step, channels = read_digest(pool.digests[pages], pool.layout.coded_channels)
    codes = read_codes(pool, pages, entry_tokens).float()
    deviation = step[:, None] * (codes - (LEVELS - 1) / 2)
    logits = torch.einsum("gpr,per->gpe", queries[:, channels], deviation)
    logits += torch.einsum("gd,pd->gp", queries, mean)[..., None]
    logits = logits.flatten(1).repeat_interleave(entry_tokens, dim=1) * scale
    return logits, read_marks(pool, pages, entry_tokens).flatten()


def best(mass: torch.Tensor, count: int) -> torch.Tensor:
    """bool [n], the `count` largest of `mass` [n]; of equals the later ones, NaN last of all."""
    order = mass.nan_to_num(nan=-torch.inf).flip(0).argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen[len(mass) - 1 - order] = True
    return chosen


def swap(
    pool: PagePool,
    pages: torch.Tensor,
    wanted: torch.Tensor,
    tier: TierLayer,
    slot: int,
    head: int,
) -> int:
    """Put the `wanted` tokens into recall pages, over those that are not; returns how many moved.

    A place whose token is still wanted keeps it; the others take what is missing, in order.
    """
    positions = pool.positions[pages].flatten()
    is_hit = (positions >= 0) & (positions < len(wanted))
    is_hit[is_hit.clone()] = wanted[positions[is_hit].long()]
    missing = wanted.clone()
    missing[positions[is_hit].long()] = False
    found = missing.nonzero().flatten()
    places = (~is_hit).nonzero().flatten()
    at, offsets = pages[places // pool.layout.page_tokens], places % pool.layout.page_tokens
    blocks = tier.blocks[slot, found // tier.page_tokens].long()
    tokens = tier.tokens[blocks, head, :, found % tier.page_tokens]
    pool.keys[at, offsets], pool.values[at, offsets] = tokens.unbind(1)
    pool.positions[at, offsets] = found.int()
    return len(found)
