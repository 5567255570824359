"""Reads `/metrics` of a server: sums of a metric over its labels, and a watch beside a load."""

from __future__ import annotations

import re
import threading
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"
CACHED = "vllm:prefix_cache_hits_total"
USAGE = "vllm:kv_cache_usage_perc"
PERIOD_S = 0.5
TIMEOUT_S = 60.0


def read_page(url: str) -> str:
    """The metrics of a server."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as page:
        return page.read().decode()


def total(page: str, name: str) -> float:
    """Sum of a metric over its labels; 0 where it has not been counted yet."""
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
    return sum(map(float, re.findall(pattern, page, re.MULTILINE)))


@dataclass
class Watch:
    """Reads the page again and again in a thread of its own until its `with` block ends.

    Args:
        url: of the server.
        running: requests that ran, at each look at which some ran or waited; filled by the thread.
        usage: largest share of the pool's blocks that was held.
        missed: looks that the server did not answer.
    """

    url: str
    running: list[float] = field(default_factory=list)
    usage: float = 0.0
    missed: int = 0

    def __enter__(self) -> Watch:
        self._before = read_page(self.url)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._after = read_page(self.url) if error is None else self._before

    def grown(self, name: str) -> float:
        """How much a counter grew between the start and the end of the `with` block."""
        return total(self._after, name) - total(self._before, name)

    def _look(self) -> None:
        while not self._done.wait(PERIOD_S):
            try:
                page = read_page(self.url)
            except OSError:
                self.missed += 1
                continue
            running = total(page, RUNNING)
            if running + total(page, WAITING):
                self.running.append(running)
            self.usage = max(self.usage, total(page, USAGE))
