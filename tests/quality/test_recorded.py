"""Three minutes of the quality lab: `hybrid` at a tenth must not fall below what was recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.quality import models, reader, report
from benchmarks.quality.results import load_plan

if TYPE_CHECKING:
    from benchmarks.quality.results import RunResult

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "benchmarks" / "results" / "quality_quick.json"
MODEL = os.environ.get("BUDGETKV_QUALITY_MODEL", str(reader.FOLDER))
TOLERANCE = 0.03
SECONDS = 1200


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """The plan `quick`, measured now; a missing model is an error, not a skip."""
    models.check_model(MODEL)
    out = tmp_path_factory.mktemp("quality")
    command = [sys.executable, "-m", "benchmarks.quality.run", "--plan", "quick", "--fresh"]
    done = subprocess.run(
        [*command, "--model", MODEL, "--out", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return load_plan(out / "quality_quick.json")[1]


def hybrid_and_full(results: list[RunResult]) -> tuple[float, float]:
    """Accuracies over all tasks of the plan."""
    full, hybrid = results
    tasks = list(full.answers)
    return hybrid.pooled(tasks).value, full.pooled(tasks).value


@pytest.mark.engine
@pytest.mark.timeout(SECONDS)
def test_hybrid_is_as_good_as_recorded(measured: list[RunResult]) -> None:
    about, recorded = load_plan(RECORDED)
    if about["fingerprint"] != models.fingerprint(MODEL):
        raise AssertionError(
            f"{RECORDED.name} is of another model ({about['fingerprint']}): run "
            "`python -m benchmarks.quality.run --plan quick`"
        )
    hybrid, full = hybrid_and_full(measured)
    recorded_hybrid, recorded_full = hybrid_and_full(recorded)
    assert hybrid >= recorded_hybrid - TOLERANCE
    assert full >= recorded_full - TOLERANCE


@pytest.mark.engine
@pytest.mark.timeout(SECONDS)
def test_full_cache_solves_the_tasks(measured: list[RunResult]) -> None:
    """Otherwise the accuracy of a policy says nothing."""
    full = measured[0]
    assert report.solved_tasks(measured, full.length_tokens) == list(full.answers)
