"""The formulas of `merge` in float64, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class HeadTokens:
    """The n tokens of one head. keys and values [n, D], positions int [n], keep and vision bool."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    is_vision: torch.Tensor


def naive_merge(
    heads: list[HeadTokens], mode: str, threshold: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """New keys and values of all tokens of every head, float64."""
    pairs = [_pivots(head, mode) for head in heads]
    if mode == "weighted":
        pairs = _without_unlike(heads, pairs)
    if mode == "value":
        pairs = [[pair for pair in head if pair[2] >= threshold] for head in pairs]
    return [_mix(head, head_pairs, mode) for head, head_pairs in zip(heads, pairs, strict=True)]


def _pivots(head: HeadTokens, mode: str) -> list[tuple[int, int, float]]:
    """(dropped token, kept token, cosine) of every dropped token."""
    units = [key / key.norm() if key.norm() else key for key in head.keys.double()]
    pairs = []
    for dropped, stays in enumerate(head.keep.tolist()):
        best: tuple[int, float] | None = None
        for kept in [] if stays else head.keep.nonzero()[:, 0].tolist():
            cosine = float(units[dropped] @ units[kept])
            alike = mode != "value" or head.is_vision[dropped] == head.is_vision[kept]
            if alike and (best is None or cosine > best[1]):
                best = kept, cosine
        if best is not None:
            pairs.append((dropped, *best))
    return pairs


def _without_unlike(
    heads: list[HeadTokens], pairs: list[list[tuple[int, int, float]]]
) -> list[list[tuple[int, int, float]]]:
    at_position: dict[int, list[float]] = {}
    for head, head_pairs in zip(heads, pairs, strict=True):
        for dropped, _, cosine in head_pairs:
            at_position.setdefault(int(head.positions[dropped]), []).append(cosine)
    everything = [cosine for cosines in at_position.values() for cosine in cosines]
    kept_positions = {
        position
        for position, cosines in at_position.items()
        if sum(cosines) / len(cosines) >= sum(everything) / len(everything)
    }
    return [
        [pair for pair in head_pairs if int(head.positions[pair[0]]) in kept_positions]
        for head, head_pairs in zip(heads, pairs, strict=True)
    ]


def _mix(
    head: HeadTokens, pairs: list[tuple[int, int, float]], mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = head.keys.double().clone(), head.values.double().clone()
    for pivot in {pivot for _, pivot, _ in pairs}:
        guests = [(dropped, cosine) for dropped, to, cosine in pairs if to == pivot]
        if mode == "value":
            values[pivot] = _mix_value(head.values.double(), pivot, guests)
            continue
        for old, new in ((head.keys.double(), keys), (head.values.double(), values)):
            party = [old[pivot]]
            for dropped, cosine in guests:
                made = {
                    "average": old[dropped],
                    "pivot": (old[dropped] + old[pivot]) / 2,
                    "weighted": cosine * old[dropped],
                }
                party.append(made[mode])
            new[pivot] = torch.stack(party).mean(dim=0)
    return keys, values


def _mix_value(values: torch.Tensor, pivot: int, guests: list[tuple[int, float]]) -> torch.Tensor:
    total, weight_sum = values[pivot].clone(), 1.0
    for dropped, cosine in guests:
        norm = float(values[dropped].norm())
        both = norm + float(values[pivot].norm())
        weight = max(0.0, cosine) * norm / both if both else 0.0
        total += weight * values[dropped]
        weight_sum += weight
    return total / weight_sum
