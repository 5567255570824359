"""Figures that say where they come from, and how sizes and counts are written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Origin(StrEnum):
    """Where a figure comes from."""

    COUNTED = "counted"
    READ = "read"
    GIVEN = "given"
    ESTIMATE = "estimate"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Figure:
    """Bytes, and what backs them.

    Args:
        num_bytes: the figure.
        origin: counted as the engine does, read from files, given by the user; or no more than an
            estimate or an assumption.
        source: how, in words.
    """

    num_bytes: int
    origin: Origin
    source: str

    @property
    def is_backed(self) -> bool:
        """Whether it is more than an estimate."""
        return self.origin not in (Origin.ESTIMATE, Origin.ASSUMED)


def size_text(num_bytes: int) -> str:
    """Bytes as a reader compares them: `56.0 KiB`, `5.83 GiB`."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    if unit == "B":
        return f"{num_bytes} B"
    return f"{size:.{2 if size < 10 else 1}f} {unit}"
