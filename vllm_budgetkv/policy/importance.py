"""How much a token matters to a head: pooled probe attention times the norm of its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation


def importance(observation: Observation, pool_width_tokens: int) -> torch.Tensor:
    """Score every token, in float32.

    With a probe: attention max-pooled over its neighbours (SnapKV, https://arxiv.org/abs/2404.14469)
    times the value's L2 norm, because a token moves the output by attention times value (VATP,
    https://arxiv.org/abs/2406.12335). Without a probe no text has been seen, so nothing tells what
    will be asked: then the value norm alone (InfiniPot-V, https://arxiv.org/abs/2506.15745), or
    recency where the norms were not computed either.

    Args:
        observation: of one layer of one request.
        pool_width_tokens: width of the max-pool, odd.

    Returns:
        float32 [H, n], 0 or more, 0 beyond `lens`.
    """
    if observation.mass is None and observation.value_norms is not None:
        return observation.value_norms
    scores = pooled_attention(observation, pool_width_tokens)
    if observation.mass is not None and observation.value_norms is not None:
        scores = scores * observation.value_norms
    return scores


def pooled_attention(observation: Observation, pool_width_tokens: int) -> torch.Tensor:
    """Score every token by the probe's attention alone, max-pooled over its neighbours (SnapKV).

    Without a probe the score is recency. Arguments and result as for `importance`.
    """
    if observation.mass is None:
        return (observation.positions + 1).float()
    return pool_runs(observation.mass, run_index(observation), pool_width_tokens // 2)


def run_index(observation: Observation) -> torch.Tensor:
    """int32 [H, n]: grows by exactly 1 from each token to its neighbour in the prompt.

    Where a token was dropped, or text meets vision, it grows by more.
    """
    return observation.positions + observation.span_ids


def pool_runs(mass: torch.Tensor, run_index: torch.Tensor, reach_tokens: int) -> torch.Tensor:
    """Max-pool along the tokens, but only over tokens that are neighbours in the prompt.

    Two held tokens with a dropped one between them, or a border of text and vision, are no
    neighbours: pooling over them would let a token of one frame lend its score to another frame.

    The window is doubled until it reaches far enough: 2 shifts instead of 6 for a width of 7.

    Args:
        mass: float32 [H, n], 0 or more.
        run_index: int32 [H, n], grows by exactly 1 from each token to its neighbour and by more
            where a run ends.
        reach_tokens: tokens to each side.

    Returns:
        float32 [H, n]. Nothing is mutated.
    """
    forward = backward = mass
    covered = 1
    while covered <= reach_tokens:
        shift = min(covered, reach_tokens + 1 - covered)
        neighbours = (run_index[..., shift:] - run_index[..., :-shift]) == shift
        after = forward[..., shift:] * neighbours
        before = backward[..., :-shift] * neighbours
        forward, backward = forward.clone(), backward.clone()
        forward[..., :-shift] = torch.maximum(forward[..., :-shift], after)
        backward[..., shift:] = torch.maximum(backward[..., shift:], before)
        covered += shift
    return torch.maximum(forward, backward)


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
