"""Time and memory of one request, for the processes of all environments; nothing but Python."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESS = Path("/proc/self")


def resident_bytes(field: str = "VmRSS") -> int:
    """Of this process: `VmRSS` now, `VmHWM` the most since the last `forget_peak`."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Let the most resident bytes be those of now (proc(5), clear_refs)."""
    (PROCESS / "clear_refs").write_text("5")


@dataclass(frozen=True)
class Sample:
    """One request alone in a warm process.

    Attributes:
        prompt_tokens: of the request.
        first_token_seconds: from the request to its first token.
        decode_ms: of each further token, median.
        idle_bytes: resident when the request came.
        peak_bytes: most resident bytes since then.
        kv_peak_bytes: most bytes of keys and values, by the system's own count.
        kv_decode_bytes: those held when the last token was written.
    """

    prompt_tokens: int
    first_token_seconds: float
    decode_ms: float
    idle_bytes: int
    peak_bytes: int
    kv_peak_bytes: float
    kv_decode_bytes: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def clock(
    prompt_tokens: int,
    first: Callable[[], None],
    further: Callable[[], None],
    num_further: int,
    held: Callable[[], tuple[float, float]],
) -> Sample:
    """Time a request.

    Args:
        prompt_tokens: of the request.
        first: brings its first token.
        further: brings one more.
        num_further: how many.
        held: (most, present) bytes of keys and values, asked in the end.
    """
    idle_bytes = resident_bytes()
    forget_peak()
    started = time.perf_counter()
    first()
    first_token_seconds = time.perf_counter() - started
    steps = []
    for _ in range(num_further):
        started = time.perf_counter()
        further()
        steps.append(time.perf_counter() - started)
    kv_peak_bytes, kv_decode_bytes = held()
    return Sample(
        prompt_tokens=prompt_tokens,
        first_token_seconds=first_token_seconds,
        decode_ms=1e3 * statistics.median(steps),
        idle_bytes=idle_bytes,
        peak_bytes=resident_bytes("VmHWM"),
        kv_peak_bytes=kv_peak_bytes,
        kv_decode_bytes=kv_decode_bytes,
    )
