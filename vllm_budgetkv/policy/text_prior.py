"""Text before vision on static heads, fairly between spans of text.

LOOK-M (https://arxiv.org/abs/2406.18139) found that models attend more to text than to vision. It
adds a large bias to vision scores in half precision, which makes them tie and lets text take any
part of the budget. Here text is a tier of its own with a cap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation


def prior_text(
    observation: Observation, scores: torch.Tensor, candidates: torch.Tensor, caps: torch.Tensor
) -> torch.Tensor:
    """Choose the text tokens that stay before any vision token.

    Spans lose tokens at the same rate b_X / n_X, best scores first: otherwise compression forgets
    whole instructions (https://arxiv.org/abs/2510.00231). Token r of a span of n tokens, r counted
    from its best, gets turn (2 r + 1) / n, and the `caps` lowest turns win: this is Sainte-Lague's
    rule for seats in a parliament, the fairest split into whole numbers. Equal turns go by score.

    Args:
        observation: `span_ids`, `span_tokens`, `text_tokens` are read.
        scores: float32 [H, n].
        candidates: bool [H, n], text tokens that are not pinned.
        caps: int [H], most tokens to choose.

    Returns:
        bool [H, n], at most `caps` per head. Nothing is mutated.
    """
    num_tokens = observation.shape[1]
    max_text = num_tokens if observation.text_tokens is None else observation.text_tokens
    # only the text, best first: all that follows is as long as the text, not as the video
    best = scores.masked_fill(~candidates, -torch.inf).topk(min(max_text, num_tokens), dim=-1)
    is_text = candidates.gather(-1, best.indices)
    turns = _turns(observation, best.indices, is_text)
    order = turns.argsort(dim=-1, stable=True)
    chosen = torch.arange(order.shape[-1], device=scores.device) < caps[..., None]
    chosen = chosen & is_text.gather(-1, order)
    return torch.zeros_like(candidates).scatter_(-1, best.indices.gather(-1, order), chosen)


def _turns(observation: Observation, tokens: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Turn of each of `tokens` (int64 [H, k], best first): float32 [H, k], infinite if no text."""
    no_span = torch.iinfo(torch.int32).max
    spans = observation.span_ids.gather(-1, tokens).masked_fill(~is_text, no_span)
    spans, order = spans.sort(dim=-1, stable=True)
    first = torch.searchsorted(spans, spans)
    rank = torch.arange(spans.shape[-1], device=spans.device) - first
    if observation.span_tokens is None:
        size = torch.searchsorted(spans, spans, right=True) - first
    else:
        size = observation.span_tokens[spans.clamp(max=observation.span_tokens.shape[0] - 1)]
    turns = (2 * rank + 1) / size
    turns.masked_fill_(spans == no_span, torch.inf)
    return torch.empty_like(turns).scatter_(-1, order, turns)
