"""Breaks the package on purpose, one place at a time, and sees that tests fail.

    python -m tests.tamper [name ...]

Every mutation is applied to a copy of the repository and the fast tests run on it. The exit status
is 1 if one survives. Without names, all run; this takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.tamper.mutations import MUTATIONS

if TYPE_CHECKING:
    from tests.tamper.mutation import Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("vllm_budgetkv", "tests", "docs", "csrc", "pyproject.toml")
TESTS = (
    "tests/arithmetic/test_quota.py",
    "tests/arithmetic/test_pictures.py",
    "tests/cache/test_pictures.py",
    "tests/cache/test_report_file.py",
    "tests/cache/test_unreadable_items.py",
    "tests/ops/test_merge.py",
    "tests/policy/test_lookm.py",
    "tests/policy/test_policies.py::test_the_most_unlike_stay_up_to_their_share",
    "tests/scheduler",
    "tests/cache/test_bank.py",
    "tests/cache/test_probes.py",
    "tests/cache/test_vision.py",
    "tests/cache/test_exact.py",
    "tests/cache/test_preemption.py",
    "tests/cache/test_needle.py",
    "tests/cache/test_scenarios.py",
    "tests/cache/test_merge.py",
    "tests/cache/test_decode_step.py",
    "tests/worker/test_frame_proof.py",
    "tests/worker/test_video_encoder.py",
    "tests/worker/test_query_samples.py",
    "tests/cache/test_streaming.py",
    "tests/worker/test_generators.py",
    "tests/worker/test_graphs.py",
    "tests/cache/test_rehearsal.py",
    "tests/cache/test_rotaries.py",
    "tests/arithmetic/test_recall.py",
    "tests/cache/test_recall.py::test_the_most_concentrated_heads_recall",
    "tests/cache/test_recall.py::test_a_head_that_recalls_reads_all_of_its_pages",
    "tests/cache/test_recall_report.py::test_without_room_a_request_is_served_as_before_and_its_report_says_so",
    "tests/cache/test_recall_report.py::test_a_preempted_request_gives_up_its_host_memory_and_takes_it_again",
    "tests/arithmetic/test_host_blocks.py",
    "tests/arithmetic/test_replayed.py",
    "tests/cache/test_replay.py",
    "tests/arithmetic/test_pinned.py",
    "tests/start/test_request_rules.py",
    "tests/cache/test_terms.py",
    "tests/cache/test_summary.py",
    "tests/cache/test_trace.py",
    "tests/inspection/test_story.py",
    "tests/inspection/test_words.py",
    "tests/inspection/test_tiles.py",
    "tests/inspection/test_page.py",
    "tests/metrics/test_meters.py",
)


def copy_repository(target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy2(source, target / name)


def run_tests(copy: Path) -> str | None:
    """Name of the first test that fails; None if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(  # noqa: S603
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", process.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the tests did not run:\n{process.stdout}\n{process.stderr}")
    return found[1]


def survivors(copy: Path, mutations: list[Mutation]) -> int:
    """Apply the mutations one by one and report which test sees each; how many none sees."""
    survived = 0
    for mutation in mutations:
        path = copy / "vllm_budgetkv" / mutation.module
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.module} has {source.count(mutation.old)} places like "
                f"{mutation.old!r}, not one; adapt the mutation to the code"
            )
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        failed = run_tests(copy)
        path.write_text(source, encoding="utf-8")
        survived += failed is None
        sys.stdout.write(f"| {mutation.name} | {failed or 'SURVIVED'} |\n")
        sys.stdout.flush()
    return survived


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of mutations")
    names = parser.parse_args().names
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_repository(copy)
        failed = run_tests(copy)
        if failed is not None:
            raise RuntimeError(f"{failed} fails on the code as it is")
        sys.stdout.write("| broken on purpose | first test that fails |\n|---|---|\n")
        survived = survivors(copy, chosen)
    sys.stdout.write(f"\n{len(chosen) - survived} of {len(chosen)} were caught\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
