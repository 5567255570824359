"""The table, the bars and the file of results."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from benchmarks.kernels.attention import BUDGET_ROWS
from benchmarks.kernels.timing import SOURCE
from vllm_budgetkv import __version__
from vllm_budgetkv.ops import triton as kernels

if TYPE_CHECKING:
    from benchmarks.kernels.rows import Row
    from benchmarks.kernels.timing import Ceilings
    from benchmarks.kernels.verdicts import Verdict

# cases whose keys and values are at least so many fill an H200
FULL_CARD_BYTES = 1 << 29


@dataclass(frozen=True)
class Bar:
    """What a figure shall reach; `value` is None where it was not measured."""

    name: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def state(self) -> str:
        if self.value is None:
            return "not measured"
        low = self.least is None or self.value >= self.least
        return "pass" if low and (self.most is None or self.value <= self.most) else "FAIL"

    def __str__(self) -> str:
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        value = "-" if self.value is None else f"{self.value:.3f}"
        return f"{self.state:12} {value:>8}  {wanted:8}  {self.name}"


@dataclass
class Report:
    """Collects verdicts and rows; printed as they come, written to a file section by section."""

    ceilings: Ceilings | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(self._line(row), flush=True)

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)
        print(f"no time: {what}", flush=True)

    def _line(self, row: Row) -> str:
        """Microseconds, rates with their shares of the ceilings, figures and peers' ratios."""
        mark = "" if row.captured or row.work is None else " (launches included)"
        line = f"{row.section:14} {row.seconds * 1e6:10.1f} us{mark}  {row.case}"
        if row.work is not None and self.ceilings is not None:
            rates = row.as_json(self.ceilings)
            line += (
                f" | {rates['bytes_per_second'] / 1e9:.0f} GB/s {rates['share_of_copy']:.0%}"
                f" | {rates['flops_per_second'] / 1e12:.1f} TFLOP/s {rates['share_of_matmul']:.0%}"
            )
        for name, figure in row.figures.items():
            line += f" | {name} {figure:.4g}"
        for name, took in row.peers.items():
            line += f" | {name} {took * 1e6:.1f} us = {took / row.seconds:.2f}x"
        return line

    def bars(self) -> list[Bar]:
        """The least, over cases that fill the card, of what the kernels shall reach."""
        full = [row for row in self._of("decode") if row.work.bytes >= FULL_CARD_BYTES]
        shares = [row.as_json(self.ceilings)["share_of_copy"] for row in full]
        flash = [row.best_flash_seconds / row.seconds for row in full if row.best_flash_seconds]
        step = [row.figures["of_forward"] for row in self._of("compress step")]
        retrieved = self._figures("retrieval", "dense_over_ours", rows=BUDGET_ROWS)
        tenth = self._figures("budget", "full_flash_over_ours", rows=BUDGET_ROWS, budget=0.1)
        graph = [verdict for verdict in self.verdicts if verdict.op == "graph"]
        held = float(all(verdict.holds for verdict in graph)) if graph else None
        return [
            Bar("decode: share of copy bandwidth, a full card", _least(shares), least=0.85),
            Bar("decode: fastest FlashAttention's time over ours", _least(flash), least=0.95),
            Bar("compress step over the chunk's forward", max(step, default=None), most=0.05),
            Bar("retrieval of 40 %: dense time over ours", _least(retrieved), least=1.8),
            Bar("decode at 10 % of 30K: FlashAttention over all", _least(tenth), least=5.0),
            Bar("decode step in a CUDA graph, replays equal", held, least=1.0),
        ]

    def _of(self, section: str) -> list[Any]:
        return [row for row in self.rows if row.section == section]

    def _figures(self, section: str, name: str, **where: float) -> list[float]:
        """A figure of the rows of which other figures have these values."""
        return [
            row.figures[name]
            for row in self._of(section)
            if name in row.figures and where.items() <= row.figures.items()
        ]

    def summary(self) -> dict[str, Any]:
        """What the last line says."""
        return {
            "about": about(),
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "wrong": [verdict._asdict() for verdict in self.verdicts if not verdict.holds],
            "checks": len(self.verdicts),
            "cases": len(self.rows),
            "left_out": self.left_out,
            "bars": [asdict(bar) | {"state": bar.state} for bar in self.bars()],
        }

    def write(self, path: Path) -> None:
        """Everything that has been measured so far."""
        assert self.ceilings is not None
        rows = [row.as_json(self.ceilings) for row in self.rows]
        verdicts = [verdict._asdict() | {"holds": verdict.holds} for verdict in self.verdicts]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.summary() | {"rows": rows, "verdicts": verdicts}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _least(values: list[float]) -> float | None:
    return min(values, default=None)


def card() -> str:
    """Name of the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, interpreted"


def file_name(quick: bool) -> str:
    """Of the results of this card."""
    slug = re.sub(r"[^a-z0-9]+", "_", card().lower()).strip("_")
    return f"kernels_{slug}{'_quick' if quick else ''}.json"


def kernels_hash() -> str:
    """Of the sources of the kernels, so that figures say which ones they are of."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def about() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "card": card(),
        "command": " ".join(["python -m benchmarks.bench_kernels", *sys.argv[1:]]),
        "kernels": kernels_hash(),
        "version": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "clock": SOURCE,
    }
