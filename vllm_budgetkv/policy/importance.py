"""How much a token matters to a head: the probe's attention to it or beside it, times the norm of
its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation

# far from the index of any run
NO_RUN = -(1 << 30)
# so little that only ties are decided: an attended token before its neighbours, near ones first
FADE = 1 / 1024


def importance(observation: Observation, reach_tokens: int = 0) -> torch.Tensor:
    """Score every token, in float32.

    With a probe: attention, lent to the neighbours of each token, times the value's L2 norm,
    because a token moves the output by attention times value (VATP,
    https://arxiv.org/abs/2406.12335). Without a probe no text has been seen, so nothing tells what
    will be asked: then the value norm alone (InfiniPot-V, https://arxiv.org/abs/2506.15745), or
    recency where the norms were not computed either.

    Args:
        observation: of one layer of one request.
        reach_tokens: how far attention is lent to either side. A question's tokens attend to what
            they repeat; what they ask for stands beside it, and nothing attends to that before the
            answer is written.

    Returns:
        float32 [H, n], 0 or more, 0 beyond `lens`.
    """
    if observation.mass is None and observation.value_norms is not None:
        return observation.value_norms
    if observation.mass is None:
        return recency(observation)
    scores = observation.mass
    if reach_tokens:
        scores = pool_runs(scores, run_index(observation), reach_tokens, FADE)
    if observation.value_norms is not None:
        scores = scores * observation.value_norms
    return scores


def recency(observation: Observation) -> torch.Tensor:
    """float32 [H, n], later tokens score higher; 0 beyond `lens`."""
    return (observation.positions + 1).float()


def pooled_attention(observation: Observation, pool_width_tokens: int) -> torch.Tensor:
    """Score every token by the probe's attention alone, max-pooled over its neighbours (SnapKV).

    Without a probe the score is recency. float32 [H, n], 0 beyond `lens`.
    """
    if observation.mass is None:
        return recency(observation)
    return pool_runs(observation.mass, run_index(observation), pool_width_tokens // 2)


def run_index(observation: Observation) -> torch.Tensor:
    """int32 [H, n]: grows by exactly 1 from each token to its neighbour in the prompt.

    Where a token was dropped, or text meets vision, it grows by more.
    """
    return observation.positions + observation.span_ids


def pool_runs(
    mass: torch.Tensor, run_index: torch.Tensor, reach_tokens: int, fade: float = 0.0
) -> torch.Tensor:
    """Lend every token's score to its neighbours in the prompt; each keeps the largest.

    Two held tokens with a dropped one between them, or a border of text and vision, are no
    neighbours. The frames of a video, and pictures without text between them, are one run, so the
    last tokens of one lend to the first of the next.

    Args:
        mass: float32 [H, n], 0 or more.
        run_index: int32 [H, n], grows by exactly 1 from each token to its neighbour and by more
            where a run ends.
        reach_tokens: how far a score reaches to either side.
        fade: share of a score that is lost with every token of distance.

    Returns:
        float32 [H, n]. Nothing is mutated.
    """
    if reach_tokens == 0:
        return mass
    place = torch.arange(mass.shape[-1], dtype=run_index.dtype, device=mass.device)
    # equal along a run
    runs = run_index - place
    lenders, neighbours = windows(mass, reach_tokens, 0.0), windows(runs, reach_tokens, NO_RUN)
    # the offsets in front, in memory too, so that the tokens are what is run along
    is_neighbour = torch.empty(neighbours.shape, dtype=torch.bool, device=mass.device)
    torch.eq(neighbours, runs, out=is_neighbour)
    lent = torch.empty(lenders.shape, dtype=mass.dtype, device=mass.device)
    torch.mul(lenders, is_neighbour, out=lent)
    if fade:
        offsets = torch.arange(-reach_tokens, reach_tokens + 1, device=mass.device)
        lent *= (1.0 - fade * offsets.abs()).view(-1, *[1] * mass.dim())
    return lent.amax(dim=0)


def windows(values: torch.Tensor, reach_tokens: int, margin: float) -> torch.Tensor:
    """[2 * reach + 1, ..., n]: a view of what stands at each offset; `margin` beyond the ends."""
    padded = pad(values, (reach_tokens, reach_tokens), value=margin)
    return padded.unfold(-1, 2 * reach_tokens + 1, 1).movedim(-1, 0)


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
