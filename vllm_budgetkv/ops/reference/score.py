"""Reference of `score`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.attend import soft_cap, softmax_fields
from vllm_budgetkv.ops.reference.tokens import locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, Softmax


def score(
    probe: torch.Tensor,
    heads: PagedHeads,
    scale: float | Softmax,
    top_k: int,
    num_sinks: int,
    takes_largest: bool,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `vllm_budgetkv.ops.score.score`; returns the fields of `Scores` in their order."""
    num_rows, num_query_heads, head_size = probe.shape
    scale, cap, sinks, value_unit = softmax_fields(scale)
    pool, num_heads = heads.pool, heads.num_heads
    pages, offsets, held = locate_tokens(heads, max_tokens)
    # a slot behind the last token may hold NaN, which no weight of zero would silence
    keys = pool.keys[pages, offsets].float().masked_fill(~held[..., None], 0.0)
    values = pool.values[pages, offsets].float().masked_fill(~held[..., None], 0.0)
    positions = pool.positions[pages, offsets].masked_fill(~held, -1)

    queries = probe.float().view(num_rows, num_heads, -1, head_size)
    logits = soft_cap(torch.einsum("mhgd,hnd->hgmn", queries, keys) * scale, cap)
    weights = _masked_softmax(logits, held)
    if sinks is not None:
        # softmax with one more logit: what all tokens have is the sigmoid of their log-sum-exp
        total = logits.masked_fill(~held[:, None, None], -torch.inf).logsumexp(dim=-1)
        weights *= (total - sinks.view(num_heads, -1, 1)).sigmoid()[..., None]
    mass = (weights.amax(dim=2) if takes_largest else weights.mean(dim=2)).mean(dim=1)

    rest = held & (positions >= num_sinks)
    top = _masked_softmax(logits, rest).topk(min(top_k, max_tokens), dim=-1).values
    topk_mass = top.sum(dim=-1).mean(dim=-1)
    topk_mass = torch.where(rest.any(dim=1)[:, None], topk_mass, 1.0)
    return mass, topk_mass.reshape(num_query_heads), values.norm(dim=-1) * value_unit, positions


def _masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax of [H, G, M, n] over the tokens in mask [H, n]; rows without one are zero."""
    masked = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return masked.softmax(dim=-1).masked_fill(~mask[:, None, None], 0.0)
