"""Memory between the launches of one decode op, at the same address in every step."""

from __future__ import annotations

import math
from functools import cache

import torch
import triton


def scratch(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """float32 of `shape` on the device of `like`, uninitialised and kept for the process.

    A captured graph may hold its address: sizes are rounded up to powers of two, and one that has
    been handed out is never freed. The next op that asks for `name` overwrites it, so two ops that
    run at once must use two names.
    """
    count = math.prod(shape)
    return _memory(name, triton.next_power_of_2(max(1, count)), like.device)[:count].view(shape)


@cache
def _memory(name: str, count: int, device: torch.device) -> torch.Tensor:
    del name  # of the cache
    return torch.empty(count, dtype=torch.float32, device=device)
