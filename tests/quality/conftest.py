"""One run of the lab's engines for all tests that look inside."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.e2e.engines import environment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def looked_inside(tmp_path_factory: pytest.TempPathFactory, qwen2_5_vl: Path) -> dict[str, Any]:
    """What `tests.quality.job` found."""
    out = tmp_path_factory.mktemp("quality") / "found.pt"
    process = subprocess.run(
        [sys.executable, "-m", "tests.quality.job", str(qwen2_5_vl), str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if process.returncode:
        raise AssertionError(f"the engines failed:\n{process.stderr[-6000:]}")
    return torch.load(out, weights_only=False)
