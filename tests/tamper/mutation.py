"""One place that is broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which stands exactly once in `module`, by `new`."""

    name: str
    module: str
    old: str
    new: str
