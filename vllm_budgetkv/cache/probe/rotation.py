"""Turn stored queries to another position (rotary embedding, https://arxiv.org/abs/2104.09864).

A query that was rotated for position p and is needed at p + d only has to be rotated by d, because
rotations add. Text tokens have equal ids on the three axes of M-RoPE, so one distance turns them,
whether the axes take sections or interleave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PHASE_TOLERANCE = 0.1
"""Radians by which a row of a table may be off: 0.003 from bfloat16, 0.03 from a float32 angle at
position 1 M, and a margin."""


@dataclass(frozen=True)
class Temperature:
    """A factor on queries that grows with their position, in steps (Llama 4, Ministral 3).

    1 + beta * log(1 + floor((position + shift) / period)), https://arxiv.org/abs/2501.19399.

    Args:
        beta: strength.
        period_tokens: positions that share a factor.
        shift_tokens: added to the position.
    """

    beta: float
    period_tokens: float
    shift_tokens: int = 0

    def factor(self, position: torch.Tensor) -> torch.Tensor:
        """float32 [M], the factor of queries at `position`, int [M]."""
        period = torch.floor((position.float() + self.shift_tokens) / self.period_tokens)
        return 1 + self.beta * torch.log1p(period)


def rotate(
    query: torch.Tensor,
    distance: torch.Tensor,
    inv_freq: torch.Tensor,
    is_neox: bool,
    start: int = 0,
) -> torch.Tensor:
    """Rotate queries that already carry a rotary embedding further on, in float32.

    Args:
        query: [..., M, Hq, D], any floating dtype.
        distance: int or float32 [M], position wanted less position given; may be negative.
        inv_freq: float32 [rotary / 2], radians per position of each pair; rotary <= D.
        is_neox: pairs are (i, i + rotary / 2) if True, (2 i, 2 i + 1) if False.
        start: first of the `rotary` elements that are rotated; those around them stay.

    Returns:
        [..., M, Hq, D] of the query's dtype. Nothing is mutated.

    Raises:
        ValueError: more frequencies than pairs of elements from `start` on.
    """
    half = inv_freq.shape[0]
    stop = start + 2 * half
    if stop > query.shape[-1]:
        raise ValueError(
            f"{half} frequencies rotate {2 * half} elements from {start} on, but a query has "
            f"{query.shape[-1]}; pass one frequency per pair"
        )
    angle = distance.float()[:, None, None] * inv_freq.float()
    cosine, sine = angle.cos(), angle.sin()
    rotary = query[..., start:stop].float()
    if is_neox:
        first, second = rotary.unflatten(-1, (2, half)).unbind(-2)
    else:
        first, second = rotary.unflatten(-1, (half, 2)).unbind(-1)
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    turned = torch.cat(pair, dim=-1) if is_neox else torch.stack(pair, dim=-1).flatten(-2)
    around = (query[..., :start], query[..., stop:])
    return torch.cat((around[0], turned.to(query.dtype), around[1]), dim=-1)


def inverse_frequencies(cos_sin_cache: torch.Tensor) -> torch.Tensor:
    """Recover the frequencies from the model's table of cosines and sines, whatever scaled them.

    Reading one row would not do: the table may be bfloat16, and the error of an angle at position 1
    grows with the distance. So the estimate of row p says which full turn row 2 p is in, and row
    2 p halves the error. Factors on cosine and sine (YaRN's mscale) drop out in the angle.

    Waits for the device if the table is on one; meant for start-up.

    Args:
        cos_sin_cache: [positions, rotary], cosines then sines, 2 positions or more.

    Returns:
        float32 [rotary / 2] on the table's device, radians per position.

    Raises:
        ValueError: the table is too short, or its rows are not multiples of one rotation (tables
            that join two scalings, such as LongRoPE's), so no single rotation joins two positions.
    """
    num_positions = cos_sin_cache.shape[0]
    if num_positions < 2:
        raise ValueError(f"the rotary table has {num_positions} rows; 2 or more are needed")
    cosine, sine = cos_sin_cache.double().chunk(2, dim=-1)
    angles = torch.atan2(sine, cosine)
    frequencies = angles[1]
    position = 1
    while 2 * position < num_positions:
        position *= 2
        turns = torch.round((position * frequencies - angles[position]) / math.tau)
        frequencies = (angles[position] + turns * math.tau) / position
    rows = torch.linspace(0, num_positions - 1, min(num_positions, 64), device=angles.device).long()
    error = rows.double()[:, None] * frequencies - angles[rows]
    worst = (error - torch.round(error / math.tau) * math.tau).abs().max().item()
    if not worst <= PHASE_TOLERANCE:
        raise ValueError(
            f"the rows of the rotary table are off by up to {worst:.3f} radians from multiples of "
            f"one rotation (tolerance {PHASE_TOLERANCE}); this model's rotary embedding is not "
            "supported, choose a policy that needs no probe"
        )
    return frequencies.float()
