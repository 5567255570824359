"""`make quality`: accuracy of every policy at every quota, on the real engine.

    python -m benchmarks.quality.run [--plan main quick ...] [--model PATH]
                                     [--count N] [--jobs 2] [--out DIR] [--fresh]

Each plan becomes `quality_<plan>.json`, its plots and the tables of `docs/experiments.md`. Runs
that are finished are kept in `build/quality/runs`, so that a run that is stopped goes on where it
was; a run that fails is reported and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quality import models, plots, reader, report, worker
from benchmarks.quality.plan import PAGE_TOKENS, PLANS
from benchmarks.quality.provenance import REPOSITORY, current_commit, machine, model_name
from benchmarks.quality.queueing import Cache, Worker, run_all
from benchmarks.quality.results import RunResult, save_plan
from benchmarks.quality.suite import SUITE

if TYPE_CHECKING:
    from concurrent.futures import Executor

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENT = REPOSITORY / "docs" / "experiments.md"
README = REPOSITORY / "README.md"
FINISHED = REPOSITORY / "build" / "quality" / "runs"


def main() -> int:
    options = parse_arguments()
    try:
        models.check_model(options.model)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    os.environ |= worker.ENVIRONMENT
    if Path(options.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    options.out.mkdir(parents=True, exist_ok=True)
    failed = sum(run_plan(name, options) for name in options.plan)
    plots.draw(options.out)
    if options.out == RESULTS:
        report.write(options.out, DOCUMENT)
        report.write(options.out, README, marks=("quality_quota",))
    print(report.summary(options.out))
    if failed:
        print(f"{failed} runs failed; see above", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against quota, on the real engine.")
    parser.add_argument(
        "--plan", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="NAME"
    )
    parser.add_argument(
        "--model", default=str(reader.FOLDER), help="folder or name that vLLM can load"
    )
    parser.add_argument("--count", type=int, help="examples of each task, instead of the plan's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure finished runs again")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="further arguments of LLM, as JSON"
    )
    return parser.parse_args()


def run_plan(name: str, options: argparse.Namespace) -> int:
    """Measures one plan and writes its file; returns how many runs failed."""
    runs = [replace(run, count=options.count or run.count) for run in PLANS[name]]
    fingerprint = models.fingerprint(options.model)
    commit = current_commit()
    measure = partial(worker.measure, model=options.model, engine=options.engine, commit=commit)
    about = {
        "command": " ".join(["python -m benchmarks.quality.run", *sys.argv[1:]]),
        "commit": commit,
        "machine": machine(),
        "model": model_name(options.model),
        "fingerprint": fingerprint,
        "suite_seed": SUITE,
        "page_tokens": PAGE_TOKENS,
    }
    with ExitStack() as stack:
        workers = []
        for _ in range(options.jobs):
            workers.append(Worker(start_process))
            stack.callback(workers[-1].close)
        cache = Cache(FINISHED, fingerprint, RunResult, fresh=options.fresh)
        results, errors = run_all(runs, cache, measure, workers, name)
    save_plan(options.out / f"quality_{name}.json", about, results)
    return len(errors)


def start_process() -> Executor:
    """A fresh process: vLLM reads its environment once and wants none that has forked."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    sys.exit(main())
