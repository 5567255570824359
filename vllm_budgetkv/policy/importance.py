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
    if observation.mass is not None:
        run_index = observation.positions + observation.span_ids
        pooled = pool_runs(observation.mass, run_index, pool_width_tokens // 2)
        if observation.value_norms is not None:
            pooled = pooled * observation.value_norms
        return pooled
    if observation.value_norms is not None:
        return observation.value_norms
    return (observation.positions + 1).float()


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
        neighbours = (run_index[:, shift:] - run_index[:, :-shift]) == shift
        after = forward[:, shift:] * neighbours
        before = backward[:, :-shift] * neighbours
        forward, backward = forward.clone(), backward.clone()
        forward[:, :-shift] = torch.maximum(forward[:, :-shift], after)
        backward[:, shift:] = torch.maximum(backward[:, shift:], before)
        covered += shift
    return torch.maximum(forward, backward)
