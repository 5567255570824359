"""Floats as integers of the same order, for exact thresholds by bisection over bits."""

from __future__ import annotations

import triton
import triton.language as tl

# below the key of every number
LOWEST_KEY: tl.constexpr = tl.constexpr(-(2**31))
# above the key of plus infinity
HIGHEST_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def sort_key(numbers: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 `numbers`; NaN counts as minus infinity, and both zeros tie."""
    numbers = tl.where(numbers == numbers, numbers, float("-inf"))
    bits = tl.where(numbers == 0.0, 0.0, numbers).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def raise_key(key: tl.tensor, bit: tl.tensor) -> tl.tensor:
    """The next key to try, where `key` is known to be low enough: `bit` counts down from 31."""
    return key ^ (tl.full([], 1, tl.int32) << bit)


@triton.jit
def largest_key(keys: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The `count`-th largest of a vector of keys; the lowest key for a count above its size."""
    found = tl.full([], LOWEST_KEY, tl.int32)
    for step in range(32):
        tried = raise_key(found, 31 - step)
        found = tl.where(tl.sum((keys >= tried).to(tl.int32)) >= count, tried, found)
    return found


@triton.jit
def key_number(key: tl.tensor) -> tl.tensor:
    """The float32 number of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
