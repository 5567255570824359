"""How far a share of right answers can be trusted, and whether two policies differ."""

from __future__ import annotations

from math import comb, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Z_95 = 1.959964


def wilson(right: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of a share by Wilson's score interval; 95 % unless `z` says otherwise.

    Based on Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Unlike `share +- error`, it stays inside 0 to 1 and has a width at 0 and at `count`.

    Args:
        right: successes, 0 to `count`.
        count: trials, 1 or more.

    Raises:
        ValueError: the counts are none.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} right of {count} is no share")
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Probability that two policies of equal skill differ this much on the same examples.

    McNemar's exact test, two-sided: of the examples that only one of them gets right, each is as
    likely to be the one's as the other's.

    Args:
        one, other: whether each example is right, in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = list(zip(one, other, strict=True))
    only_one = sum(a and not b for a, b in pairs)
    only_other = sum(b and not a for a, b in pairs)
    differing = only_one + only_other
    fewer = min(only_one, only_other)
    tail = sum(comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return min(1.0, 2 * tail)
