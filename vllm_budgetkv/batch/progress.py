"""What a batch tells while it runs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

TELL_SECONDS = 5.0


class Progress:
    """Counts rows and tells of them on standard error, at most every few seconds.

    Args:
        total_rows: of the input.
        done_rows: of an earlier run.
    """

    def __init__(self, total_rows: int, done_rows: int) -> None:
        self.total_rows = total_rows
        self.done_rows = done_rows
        self.answered_rows = 0
        self.failed_rows = 0
        self.held_blocks = 0
        self.full_cache_blocks = 0
        self.start_seconds = time.monotonic()
        self.told_seconds = self.start_seconds

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Count rows that were written, and tell if it is time. Mutates the counts."""
        for row in answers:
            if row["error"] is not None:
                self.failed_rows += 1
                continue
            self.answered_rows += 1
            said = row["response"]["body"].get("kv_transfer_params") or {}
            if report := said.get("budgetkv"):
                self.held_blocks += report["peak_blocks"]
                self.full_cache_blocks += report["full_cache_blocks"]
        if time.monotonic() - self.told_seconds >= TELL_SECONDS:
            self.tell(self.line())

    def line(self) -> str:
        """Rows answered, failed and left, how fast, and what they held of the cache."""
        seconds = time.monotonic() - self.start_seconds
        parts = [f"{self.done_rows + self.answered_rows:,} of {self.total_rows:,} rows answered"]
        if self.failed_rows:
            parts.append(f"{self.failed_rows:,} with an error")
        if self.done_rows:
            parts.append(f"{self.done_rows:,} by an earlier run")
        if self.answered_rows:
            parts.append(f"{self.answered_rows:,} in {seconds:,.0f} s")
        if self.full_cache_blocks:
            parts.append(
                f"held {self.held_blocks:,} blocks where a full cache holds "
                f"{self.full_cache_blocks:,}"
            )
        return ", ".join(parts)

    def tell(self, text: str) -> None:
        """Write a line. Mutates the time of the last one."""
        self.told_seconds = time.monotonic()
        sys.stderr.write(f"budgetkv: {text}\n")
        sys.stderr.flush()
