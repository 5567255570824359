"""The last of several programs to finish does what needs all of them: no second launch."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


def counters(count: int, device: torch.device) -> torch.Tensor:
    """int32 [>= count], all 0; kept for the process, so its users leave 0 behind."""
    return _zeros(triton.next_power_of_2(count), device)


@cache
def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(counter: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """Whether every other program that counts here has finished; resets the counter then.

    What the others wrote is visible to the last one, and what they read it may overwrite.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return is_last
