"""How much a token matters to a head: pooled probe attention times the norm of its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation

# far from the index of any run
NO_RUN = -(1 << 30)
# so little that only ties are decided: an attended token before its neighbours, near ones first
TEXT_FADE = 1 / 1024


def importance(
    observation: Observation, pool_width_tokens: int, text_reach: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Score every token, in float32.

    With a probe: attention max-pooled over its neighbours (SnapKV, https://arxiv.org/abs/2404.14469)
    times the value's L2 norm, because a token moves the output by attention times value (VATP,
    https://arxiv.org/abs/2406.12335). Without a probe no text has been seen, so nothing tells what
    will be asked: then the value norm alone (InfiniPot-V, https://arxiv.org/abs/2506.15745), or
    recency where the norms were not computed either.

    Args:
        observation: of one layer of one request.
        pool_width_tokens: width of the max-pool, odd.
        text_reach: tokens of text before and behind an attended one that its attention reaches
            beyond the pool.

    Returns:
        float32 [H, n], 0 or more, 0 beyond `lens`.
    """
    if observation.mass is None and observation.value_norms is not None:
        return observation.value_norms
    scores = pooled_attention(observation, pool_width_tokens)
    if observation.mass is not None and any(text_reach):
        scores = torch.where(observation.is_vision, scores, reach_text(observation, *text_reach))
    if observation.mass is not None and observation.value_norms is not None:
        scores = scores * observation.value_norms
    return scores


def reach_text(observation: Observation, before_tokens: int, behind_tokens: int) -> torch.Tensor:
    """Attention lent along runs of text, float32 [H, n]; without meaning for vision.

    A question's words attend to the words that it repeats. What it asks for stands beside them, and
    no token of the question attends to that: the answer will.
    """
    assert observation.mass is not None
    index = run_index(observation)
    return pool_runs(observation.mass, index, before_tokens, behind_tokens, TEXT_FADE)


def pooled_attention(observation: Observation, pool_width_tokens: int) -> torch.Tensor:
    """Score every token by the probe's attention alone, max-pooled over its neighbours (SnapKV).

    Without a probe the score is recency. Arguments and result as for `importance`.
    """
    if observation.mass is None:
        return (observation.positions + 1).float()
    reach_tokens = pool_width_tokens // 2
    return pool_runs(observation.mass, run_index(observation), reach_tokens, reach_tokens)


def run_index(observation: Observation) -> torch.Tensor:
    """int32 [H, n]: grows by exactly 1 from each token to its neighbour in the prompt.

    Where a token was dropped, or text meets vision, it grows by more.
    """
    return observation.positions + observation.span_ids


def pool_runs(
    mass: torch.Tensor,
    run_index: torch.Tensor,
    before_tokens: int,
    behind_tokens: int,
    fade: float = 0.0,
) -> torch.Tensor:
    """Lend every token's score to its neighbours in the prompt; each keeps the largest.

    Two held tokens with a dropped one between them, or a border of text and vision, are no
    neighbours: pooling over them would let a token of one frame lend its score to another frame.

    Args:
        mass: float32 [H, n], 0 or more.
        run_index: int32 [H, n], grows by exactly 1 from each token to its neighbour and by more
            where a run ends.
        before_tokens, behind_tokens: how far a score reaches to earlier and to later tokens.
        fade: share of a score that is lost with every token of distance.

    Returns:
        float32 [H, n]. Nothing is mutated.
    """
    if before_tokens == behind_tokens == 0:
        return mass
    # a token takes from those before it what reaches behind them
    margins, width = (behind_tokens, before_tokens), before_tokens + behind_tokens + 1
    lenders = pad(mass, margins).unfold(-1, width, 1)
    index = pad(run_index, margins, value=NO_RUN).unfold(-1, width, 1)
    offsets = torch.arange(-behind_tokens, before_tokens + 1, device=mass.device)
    is_neighbour = index - run_index[..., None] == offsets
    lent = lenders * is_neighbour
    if fade:
        lent = lent * (1.0 - fade * offsets.abs())
    return lent.amax(dim=-1)


def average_runs(values: torch.Tensor, run_index: torch.Tensor, reach_tokens: int) -> torch.Tensor:
    """Average-pool along the tokens over those that are neighbours in the prompt.

    Args:
        values: float32 [H, n].
        run_index: int32 [H, n], as in `pool_runs`.
        reach_tokens: tokens to each side.

    Returns:
        float32 [H, n]. Nothing is mutated.
    """
    total, count = values.clone(), torch.ones_like(values)
    for shift in range(1, reach_tokens + 1):
        neighbours = (run_index[:, shift:] - run_index[:, :-shift]) == shift
        total[:, :-shift] += values[:, shift:] * neighbours
        total[:, shift:] += values[:, :-shift] * neighbours
        count[:, :-shift] += neighbours
        count[:, shift:] += neighbours
    return total / count
