"""One line of the report, and what the cases need to make it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels.peers import REFUSALS, Batch, is_flash
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.kernels.peers import Peer
    from benchmarks.kernels.shapes import ModelShape
    from benchmarks.kernels.timing import Ceilings, Clock
    from benchmarks.kernels.work import Work

DTYPE = torch.bfloat16
# of a peer's result, in rounding steps of its largest number: it shall do the same work, no more
PEER_STEPS = 16
MAX_REASON_LETTERS = 90


@dataclass(frozen=True)
class Bench:
    """The clock, what the card can do, and how much is asked."""

    clock: Clock
    ceilings: Ceilings
    page_tokens: int
    quick: bool
    device: torch.device

    def layout(self, model: ModelShape) -> PageLayout:
        return PageLayout(self.page_tokens, model.head_size, DTYPE)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(DTYPE)

    def int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def rows(self, count: int, tokens: int = 1) -> ops.BatchRows:
        """The first slots, each with `tokens` new ones, whose tables name their pages."""
        starts, none = self.arange(count + 1) * tokens, self.arange(count) * 0
        return ops.BatchRows(self.arange(count), starts, none, none.bool())

    def arange(self, count: int) -> torch.Tensor:
        """int32 [count]."""
        return torch.arange(count, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Row:
    """One timed case.

    Attributes:
        section: group of cases.
        case: sizes, for people.
        seconds: median of our kernel; host time where `work` is None.
        captured: whether a graph was replayed.
        work: bytes and operations that the case needs at least.
        peers: median seconds of others on equal work.
        refused: why other peers have no time.
        figures: what bars and ratios are made of, by name.
    """

    section: str
    case: str
    seconds: float
    captured: bool
    work: Work | None = None
    peers: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def best_flash_seconds(self) -> float | None:
        """Of the fastest FlashAttention among the peers."""
        return min((took for name, took in self.peers.items() if is_flash(name)), default=None)

    def as_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """All of it, with rates and their shares of the ceilings."""
        found = asdict(self)
        if self.work is not None:
            bandwidth, rate = self.work.bytes / self.seconds, self.work.flops / self.seconds
            found |= {
                "bytes_per_second": bandwidth,
                "flops_per_second": rate,
                "share_of_copy": bandwidth / ceilings.copy_bytes_per_second,
                "share_of_matmul": rate / ceilings.matmul_flops_per_second,
            }
        return found


def time_peers(
    bench: Bench, batch: Batch, peers: dict[str, Peer], expected: torch.Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the peers whose result is ours, and why the others have none.

    Args:
        expected: our result, [R * t, Hq, D].
    """
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    allowed = PEER_STEPS * torch.finfo(DTYPE).eps * expected.abs().max().item()
    for name, peer in peers.items():
        try:
            run = peer(batch)
            error = (run().double() - expected.double()).abs().max().item()
            if not error <= allowed:
                refused[name] = f"error {error:.2e} exceeds {allowed:.2e}"
                continue
            seconds[name] = bench.clock.measure(run).seconds
        except REFUSALS as refusal:
            refused[name] = f"{type(refusal).__name__}: {refusal}"[:MAX_REASON_LETTERS]
    return seconds, refused


def measure_row(
    bench: Bench,
    section: str,
    case: str,
    run: Callable[[], object],
    work: Work,
    reset: Callable[[], None] | None = None,
) -> Row:
    """Time our side alone."""
    timing = bench.clock.measure(run, reset)
    return Row(section, case, timing.seconds, timing.captured, work)
