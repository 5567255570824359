"""Reference of `merge`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.tokens import locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def merge(
    keep: torch.Tensor,
    heads: PagedHeads,
    is_vision: torch.Tensor,
    mode: str,
    seen_tokens: int,
    threshold: float,
) -> None:
    """See `vllm_budgetkv.ops.merge.merge`."""
    pool = heads.pool
    pages, offsets, held = locate_tokens(heads, keep.shape[1])
    # a slot behind the last token may hold NaN, which no weight of zero would silence
    keys = pool.keys[pages, offsets].float().masked_fill(~held[..., None], 0.0)
    values = pool.values[pages, offsets].float().masked_fill(~held[..., None], 0.0)

    modality = is_vision if mode == "value" else torch.zeros_like(is_vision)
    similarity, pivots = _find_pivots(keys, keep & held, modality)
    moves = held & ~keep & (similarity > -torch.inf)
    if mode == "weighted":
        positions = pool.positions[pages, offsets].long().clamp(0, max(seen_tokens - 1, 0))
        moves &= _is_alike(similarity, positions, moves, seen_tokens)
    if mode == "value":
        moves &= similarity >= threshold
    weights = _weigh(similarity, values.norm(dim=-1), pivots, mode).masked_fill(~moves, 0.0)

    def sum_by_pivot(numbers: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(numbers).scatter_add_(1, pivots, numbers)

    counts, weight_sums = sum_by_pivot(moves.float()), sum_by_pivot(weights)
    # with "pivot" a source is first averaged with its pivot, which so gets the other half
    own = 1 + weight_sums if mode == "pivot" else torch.ones_like(weight_sums)
    total = 1 + (weight_sums if mode == "value" else counts)
    taken = counts > 0
    slots = pages[taken], offsets[taken]
    index = pivots[..., None].expand_as(keys)
    for field, tokens in ((pool.keys, keys), (pool.values, values)):
        if mode == "value" and field is pool.keys:
            continue
        sums = (own[..., None] * tokens).scatter_add_(1, index, weights[..., None] * tokens)
        field[slots] = (sums / total[..., None])[taken].to(field.dtype)


def _find_pivots(
    keys: torch.Tensor, kept: torch.Tensor, modality: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest cosine of every token with a kept one of its modality, and the first that has it.

    float32 [H, n], minus infinity where there is none, and int64 [H, n].
    """
    norms = keys.norm(dim=-1, keepdim=True)
    units = torch.where(norms > 0, keys / norms, 0.0)
    pairs = []
    # head by head, because the matrix of one head is large enough
    for unit, is_kept, kind in zip(units, kept, modality, strict=True):
        cosines = unit @ unit.T
        fits = is_kept & (kind[:, None] == kind)
        pairs.append(cosines.masked_fill_(~fits, -torch.inf).max(dim=1))
    return torch.stack([p.values for p in pairs]), torch.stack([p.indices for p in pairs])


def _is_alike(
    similarity: torch.Tensor, positions: torch.Tensor, moves: torch.Tensor, seen_tokens: int
) -> torch.Tensor:
    """bool [H, n]: the position's mean over the heads that move it is at least the overall mean."""
    cosines = similarity.double().masked_fill(~moves, 0.0)
    sums = cosines.new_zeros(seen_tokens).index_add_(0, positions.flatten(), cosines.flatten())
    counts = torch.zeros_like(sums).index_add_(0, positions.flatten(), moves.flatten().double())
    return (sums / counts)[positions] >= cosines.sum() / moves.sum()


def _weigh(
    similarity: torch.Tensor, norms: torch.Tensor, pivots: torch.Tensor, mode: str
) -> torch.Tensor:
    """Weight of every token in its pivot's mean, float32 [H, n]."""
    if mode == "weighted":
        return similarity
    if mode == "value":
        both = norms + norms.gather(1, pivots)
        return torch.where(both > 0, similarity.clamp(min=0) * norms / both, 0.0)
    return torch.full_like(similarity, 0.5 if mode == "pivot" else 1.0)
