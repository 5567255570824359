"""Ranges of a prompt that stay whatever a policy says, as a request asks for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

_RANGE = re.compile(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*")
MOST_RANGES = 64


@dataclass(frozen=True)
class Pinned:
    """Positions of a prompt that no compression drops.

    Args:
        ranges: first position and the one behind the last of each, ascending and apart.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ranges as "0:128,500:512"; those that touch become one.

        Raises:
            ValueError: the text says no such ranges.
        """
        found: list[tuple[int, int]] = []
        parts = text.split(",")
        if len(parts) > MOST_RANGES:
            raise ValueError(f"has {len(parts)} ranges, at most {MOST_RANGES} are allowed")
        for part in parts:
            match = _RANGE.fullmatch(part)
            if match is None:
                raise ValueError(f"must be ranges of positions as 0:128,500:512; got {part!r}")
            start, stop = int(match[1]), int(match[2])
            if start >= stop:
                raise ValueError(f"has the empty range {part.strip()}")
            found.append((start, stop))
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    @property
    def stop(self) -> int:
        """Behind the last pinned position; 0 if there is none."""
        return self.ranges[-1][1] if self.ranges else 0

    def count_before(self, position: int) -> int:
        """Pinned tokens in front of a position; every head holds them all."""
        return sum(min(stop, position) - start for start, stop in self.ranges if start < position)
