"""The clock: CUDA events around replays of a graph, each behind a flush of the L2 cache."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = "CUDA events around the replay of a graph of one call, L2 flushed before; medians"
WARM_UPS = 3
MIN_REPEATS, MAX_REPEATS = 9, 100
FLUSH_TIMES_CACHE = 4
COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192
# a stream takes about a thousand launches before it makes the host wait
MAX_QUEUED_LAUNCHES = 500
HOST_SAMPLES = 5


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; without `captured` the launches' own cost may be in it."""

    seconds: float
    captured: bool


@dataclass(frozen=True)
class Ceilings:
    """What the card does, measured: a copy counts its bytes read and written, and the least time.

    `floor_seconds` is what an almost empty kernel takes by this clock.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    floor_seconds: float


class Clock:
    """Times calls on the current device.

    Args:
        target_seconds: of repeats for one figure.
    """

    def __init__(self, target_seconds: float) -> None:
        self._target_seconds = target_seconds
        self._flush_sum = torch.empty((), device="cuda")
        cache_bytes = torch.cuda.get_device_properties(self._flush_sum.device).L2_cache_size
        # read, not written: lines that are written back later would cost the call bandwidth
        self._flushed = torch.zeros(FLUSH_TIMES_CACHE * cache_bytes // 4, device="cuda")

    def flush(self) -> None:
        """Push everything else out of the L2 cache."""
        torch.sum(self._flushed, dim=0, out=self._flush_sum)

    def measure(self, run: Callable[[], object], reset: Callable[[], None] | None = None) -> Timing:
        """Time a call; `reset` undoes, untimed and on the device alone, what it mutates."""
        for _ in range(WARM_UPS):
            if reset is not None:
                reset()
            run()
        torch.cuda.synchronize()
        graph = _graph_of(run)
        call = run if graph is None else graph.replay
        estimate = self._once([call], reset)[0]
        repeats = int(self._target_seconds / max(estimate, 1e-6))
        repeats = min(max(repeats, MIN_REPEATS), MAX_REPEATS)
        return Timing(statistics.median(self._once([call] * repeats, reset)), graph is not None)

    def _once(
        self, calls: list[Callable[[], object]], reset: Callable[[], None] | None
    ) -> list[float]:
        """Seconds of each call."""
        pairs = []
        for call in calls:
            if reset is not None:
                reset()
            self.flush()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]

    def ceilings(self) -> Ceilings:
        """Copy bandwidth, bfloat16 matrix products on random data, and the least time."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = self.measure(lambda: target.copy_(source)).seconds
        shape = (MATMUL_SIZE, MATMUL_SIZE)
        left, right = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
        out = torch.empty_like(left)
        product = self.measure(lambda: torch.mm(left, right, out=out)).seconds
        word = torch.zeros(1, device="cuda")
        floor = self.measure(lambda: word.add_(1)).seconds
        return Ceilings(2 * COPY_BYTES / copy, 2 * MATMUL_SIZE**3 / product, floor)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call.

    Raises:
        RuntimeError: the call waits for the device, or allocates behind torch's back.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """A graph of one call, or None where a library of a peer waits for the device."""
    try:
        return capture(run)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def host_seconds(
    run: Callable[[], object], launches: int, reset: Callable[[], None] | None = None
) -> float:
    """Median seconds that the host spends in one call of so many launches, waiting for nothing."""
    calls = max(1, MAX_QUEUED_LAUNCHES // launches)
    for _ in range(WARM_UPS):
        run()
    samples = []
    for _ in range(HOST_SAMPLES):
        if reset is not None:
            reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(samples)
