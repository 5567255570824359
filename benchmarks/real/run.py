"""`make quality-real`: what budgets cost on a pretrained language model.

    python -m benchmarks.real.run [--plan NAME ...] [--count N] [--jobs 2] [--out DIR] [--fresh]

Without `--plan` it runs every policy on text and on frames; the other plans, which take twice as
long together, are for `--plan`. Each becomes `real_<plan>.json` and tables of
`docs/experiments.md`. Finished runs are kept in `build/real/runs`; a run that fails is reported and
does not stop the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.quality import models
from benchmarks.quality.provenance import REPOSITORY, current_commit
from benchmarks.quality.queueing import Cache, Worker, run_all
from benchmarks.quality.results import save_plan
from benchmarks.quality.run import start_process
from benchmarks.real import eyes, report, weights, worker
from benchmarks.real.origin import origin
from benchmarks.real.packages import FOLDER
from benchmarks.real.plan import CORE, PAGE_TOKENS, PLANS
from benchmarks.real.results import RunResult

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENT = REPOSITORY / "docs" / "experiments.md"


def main() -> int:
    options = parse_arguments()
    os.environ |= worker.ENVIRONMENT
    options.out.mkdir(parents=True, exist_ok=True)
    failed = sum(run_plan(name, options) for name in options.plan)
    if options.out == RESULTS:
        report.write(options.out, DOCUMENT)
    print(report.summary(options.out))
    if failed:
        print(f"{failed} runs failed; see above", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Budgets on a pretrained language model.")
    parser.add_argument(
        "--plan", nargs="+", choices=list(PLANS), default=list(CORE), metavar="NAME"
    )
    parser.add_argument("--count", type=int, help="examples of each task, instead of the plan's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure finished runs again")
    return parser.parse_args()


def run_plan(name: str, options: argparse.Namespace) -> int:
    """Measures one plan and writes its file; returns how many runs failed."""
    runs = [replace(run, count=options.count or run.count) for run in PLANS[name]]
    sees = any(run.shows_frames for run in runs)
    model = str(eyes.eyes_folder() if sees else weights.model_folder())
    fingerprint, commit = models.fingerprint(model), current_commit()
    about = origin("run") | {
        "model": eyes.LABEL if sees else weights.LABEL,
        "gguf_sha256": weights.GGUF.sha256,
        "fingerprint": fingerprint,
        "page_tokens": PAGE_TOKENS,
    }
    with ExitStack() as stack:
        workers = []
        for _ in range(options.jobs):
            workers.append(Worker(start_process))
            stack.callback(workers[-1].close)
        cache = Cache(FOLDER / "runs", fingerprint, RunResult, fresh=options.fresh)
        measure = partial(worker.measure, model=model, commit=commit)
        results, errors = run_all(runs, cache, measure, workers, name)
    save_plan(options.out / f"real_{name}.json", about, results)
    return len(errors)


if __name__ == "__main__":
    sys.exit(main())
