"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """OK; a note, with which a server starts; wrong, with which it does not, or not as asked."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what.
        state: how it is.
        told: what was found.
        to_do: what to change; empty if nothing.
    """

    name: str
    state: State
    told: str
    to_do: str = ""
