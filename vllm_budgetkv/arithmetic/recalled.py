"""What came back from host memory, counted: it travels from a worker to the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Recalled:
    """What heads brought back from host memory.

    Args:
        steps: of requests, in which heads looked for tokens.
        tokens: that stood ready in a step, summed over steps and heads.
        moved_tokens: of these, those that had to be fetched.
        moved_bytes: their keys and values.
    """

    steps: int = 0
    tokens: int = 0
    moved_tokens: int = 0
    moved_bytes: int = 0

    def add(self, other: Recalled) -> None:
        """Count what another counts, too."""
        self.steps += other.steps
        self.tokens += other.tokens
        self.moved_tokens += other.moved_tokens
        self.moved_bytes += other.moved_bytes
