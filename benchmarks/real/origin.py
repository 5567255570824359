"""Where a result comes from: command, commit, machine, weights and seed."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.quality.provenance import current_commit, machine
from benchmarks.real import weights
from benchmarks.real.tasks import SUITE


def origin(module: str) -> dict[str, Any]:
    """Of what this process measures, started as `python -m benchmarks.real.<module>`."""
    return {
        "command": " ".join([f"python -m benchmarks.real.{module}", *sys.argv[1:]]),
        "commit": current_commit(),
        "machine": machine(),
        "model": weights.LABEL,
        "suite_seed": SUITE,
    }
