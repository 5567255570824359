"""Memory of every process of a server over time, and whether it grows."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20
CONFIDENCE = 0.95
# a process is flat if even the upper end of the interval of its slope stays below, each hour
LIMIT_MIB, LIMIT_SHARE = 16.0, 0.02
LEAST_POINTS = 10
RULE = (
    f"flat: over the second half, the upper end of the {CONFIDENCE:.0%} interval of the slope of "
    f"private memory (USS) is at most {LIMIT_SHARE:.0%} of the process or {LIMIT_MIB:.0f} MiB an "
    "hour, whichever is more; grows: the lower end is above that; unsure: else. Least squares over "
    "the least memory of each sixtieth of the run, since what requests hold comes and goes, the "
    "interval widened by the correlation of neighbouring residuals"
)


@dataclass(frozen=True)
class Line:
    """A straight line through points.

    Args:
        slope: of y, per unit of x.
        margin: half of the interval of the slope.
    """

    slope: float
    margin: float


@dataclass
class Process:
    """One process of the server.

    Args:
        name: command, without arguments.
        seconds: when it was looked at, since the start.
        uss_mib: private memory then.
        rss_mib: resident memory then.
        files: open files then.
        threads: then.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    uss_mib: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


@dataclass
class Memory:
    """Every process of the tree below `pid`, by its id; filled by `look`."""

    pid: int
    start: float = field(default_factory=time.monotonic)
    processes: dict[int, Process] = field(default_factory=dict)

    def look(self) -> None:
        """Note what each process holds now. Those that end meanwhile are left out of it."""
        root = psutil.Process(self.pid)
        for process in (root, *root.children(recursive=True)):
            try:
                with process.oneshot():
                    known = self.processes.setdefault(process.pid, Process(name_of(process)))
                    held = process.memory_full_info()
                    counts = process.num_fds(), process.num_threads()
            except psutil.NoSuchProcess:
                continue
            known.seconds.append(time.monotonic() - self.start)
            known.uss_mib.append(held.uss / MIB)
            known.rss_mib.append(held.rss / MIB)
            known.files.append(counts[0])
            known.threads.append(counts[1])


def name_of(process: psutil.Process) -> str:
    """The title that vLLM gives a process, or the first words of a command without paths."""
    words = [word.rsplit("/", 1)[-1] for word in process.cmdline() or [process.name()]]
    return " ".join(words[:3]) if "python" in words[0] else words[0]


def judge(process: Process, total_s: float) -> dict[str, Any]:
    """What the results file says of a process.

    Args:
        process: looked at over the whole run.
        total_s: of the run; a sixtieth of it is a window.

    Returns:
        Figures in MiB and hours, and the verdict: "flat", "grows", "unsure", or "too short" where
        it did not live for enough windows of the second half.
    """
    seen = windows(process.seconds, process.uss_mib, total_s / 60)
    points = [point for point in seen if point[0] >= total_s / 2]
    found: dict[str, Any] = {
        "name": process.name,
        "looks": len(process.seconds),
        "uss_first_mib": round(process.uss_mib[0], 1),
        "uss_middle_mib": round(process.uss_mib[len(process.uss_mib) // 2], 1),
        "uss_last_mib": round(process.uss_mib[-1], 1),
        "rss_most_mib": round(max(process.rss_mib), 1),
        "files": [process.files[0], process.files[-1], max(process.files)],
        "threads": [process.threads[0], process.threads[-1], max(process.threads)],
        "uss_windows_mib": [round(mib, 2) for _, mib in seen],
    }
    if len(points) < LEAST_POINTS:
        return found | {"verdict": "too short"}
    line = fit([seconds / 3600 for seconds, _ in points], [mib for _, mib in points])
    limit = max(LIMIT_MIB, LIMIT_SHARE * statistics.median(mib for _, mib in points))
    low, high = line.slope - line.margin, line.slope + line.margin
    return found | {
        "slope_mib_per_hour": round(line.slope, 2),
        "interval_mib_per_hour": [round(low, 2), round(high, 2)],
        "limit_mib_per_hour": round(limit, 2),
        "verdict": "flat" if high <= limit else "grows" if low > limit else "unsure",
    }


def windows(
    seconds: Sequence[float], values: Sequence[float], window_s: float
) -> list[tuple[float, float]]:
    """Middle and least value of each window of time."""
    grouped: dict[int, list[tuple[float, float]]] = {}
    for point in zip(seconds, values, strict=True):
        grouped.setdefault(int(point[0] // window_s), []).append(point)
    return [
        (statistics.median(x for x, _ in points), min(y for _, y in points))
        for points in grouped.values()
    ]


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares, with the interval of the slope.

    Neighbouring residuals that agree are fewer points than they seem: with their correlation r, n
    points count as n (1 - r) / (1 + r).

    Args:
        xs: at least three, not all equal.
        ys: as many.
    """
    count = len(xs)
    centre_x, centre_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - centre_x) ** 2 for x in xs)
    slope = sum((x - centre_x) * (y - centre_y) for x, y in zip(xs, ys, strict=True)) / spread
    residuals = [y - centre_y - slope * (x - centre_x) for x, y in zip(xs, ys, strict=True)]
    squares = sum(residual**2 for residual in residuals)
    if squares == 0:
        return Line(slope, 0.0)
    products = sum(a * b for a, b in zip(residuals, residuals[1:], strict=False))
    correlation = min(max(products / squares, 0.0), 0.95)
    widened = math.sqrt((1 + correlation) / (1 - correlation))
    error = math.sqrt(squares / (count - 2) / spread)
    return Line(slope, student(count - 2) * error * widened)


def student(freedom: int) -> float:
    """Two-sided quantile of Student's t at `CONFIDENCE`, by its expansion around the normal one."""
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
