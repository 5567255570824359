"""Reference of `recall`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.encode import LEVELS, read_digest, unpack
from vllm_budgetkv.ops.reference.mark import unpack_bits

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
            mass, is_held = look_up(
                queries[row, head], pool, recalls.table[slot, head], num_tokens, scale
            )
            wanted = best(mass.masked_fill(is_held, -1.0), count)
            pages = heads.table[slot, head, : count // page_tokens].long()
            moved[slot, head] += swap(pool, pages, wanted, tier, slot, head)


def look_up(
    queries: torch.Tensor, pool: PagePool, index: torch.Tensor, num_tokens: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an index says of its n tokens.

    Args:
        queries: float32 [G, D], of the query heads of one KV head.
        pool: with the index pages.
        index: int32 [I], the head's index pages.
        num_tokens: n.
        scale: of the logits.

    Returns:
        mass: float32 [n], attention of the queries, summed.
        is_held: bool [n], tokens that the head holds on the device.
    """
    layout = pool.layout
    pages = index[: -(-num_tokens // layout.index_tokens)].long()
    mean, step, channels = read_digest(pool.digests[pages], layout.coded_channels)
    deviation = step[:, None] * (unpack(pool.codes[pages]).float() - (LEVELS - 1) / 2)
    asked = queries[:, channels]
    logits = torch.einsum("gpr,per->gpe", asked, deviation)
    logits += torch.einsum("gd,pd->gp", queries, mean)[..., None]
    logits = logits.flatten(1)[:, :num_tokens] * scale
    is_held = unpack_bits(pool.positions[pages], layout.index_tokens).flatten()[:num_tokens]
    return logits.softmax(dim=-1).sum(dim=0), is_held


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
