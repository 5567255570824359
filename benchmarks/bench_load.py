"""`vllm bench serve` against stock vLLM and ours on equal bytes: `python -m benchmarks.bench_load`.

    python -m benchmarks.bench_load [--repeats 1] [--cases burst-short ...] [--sides stock ours]
    python -m benchmarks.bench_load --quick           # two short requests a case, a small model
    python -m benchmarks.bench_load --report          # tables and plot of the results there are

One server at a time, stock and ours in turn for each pool; both get the same bytes, of which ours
pays its digests, page tables and probe banks. `benchmarks/load/cases.py` has pools and cases.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.bench import MODEL, REPOSITORY, RESULTS
from benchmarks.load import report, serving
from benchmarks.load.cases import CASES, POOLS, Case
from benchmarks.quality.provenance import current_commit, machine
from vllm_budgetkv.testing.models import build_qwen2_5_vl

FILE = RESULTS / "bench_load.json"
SIDES = ("stock", "ours")
SIZES = {
    "bench": MODEL,
    "small": MODEL | {"layers": 4, "hidden": 512, "heads": 8, "intermediate": 1024},
}
QUICK_PROMPTS, QUICK_TOKENS = 2, 8


def main() -> None:
    options = parse_arguments()
    result = json.loads(FILE.read_text(encoding="utf-8")) if options.report else measure(options)
    if not options.report:
        print(report.sides_table(result))
        print(report.bars_table(result))
        print(report.spent_table(result))
    if options.report or options.out == FILE:
        report.write(result, REPOSITORY, RESULTS)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many requests at once on equal KV memory.")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all servers (default: 1)")
    parser.add_argument("--requests", type=int, help="of each case, instead of its own number")
    parser.add_argument("--model-size", choices=SIZES, default="bench")
    parser.add_argument("--dtype", default="bfloat16", help="of model and cache")
    parser.add_argument("--out", type=Path, default=FILE, help="file of the results")
    parser.add_argument("--quick", action="store_true", help="see that it works; needs --out")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables")
    options = parser.parse_args(arguments)
    if options.quick and options.out == FILE:
        parser.error("--quick measures nothing worth keeping: give it an --out of its own")
    return options


def chosen_cases(options: argparse.Namespace) -> dict[str, Case]:
    """The cases of the command line; what was cut short is called so."""
    cases = {name: CASES[name] for name in options.cases}
    prompts = options.requests or (QUICK_PROMPTS if options.quick else None)
    if prompts is not None:
        cases = {
            name: replace(case, prompts=prompts, about=f"{case.about} [{prompts} requests]")
            for name, case in cases.items()
        }
    if options.quick:
        cases = {
            name: replace(
                case, output_tokens=QUICK_TOKENS, about=f"{case.about} [{QUICK_TOKENS} out]"
            )
            for name, case in cases.items()
        }
    return cases


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that was asked for; the file is written after each server."""
    size = "small" if options.quick else options.model_size
    model = str(build_qwen2_5_vl(REPOSITORY / "build" / "models", **SIZES[size]))
    cases = chosen_cases(options)
    names = sorted({case.pool for case in cases.values()}, key=list(POOLS).index)
    blocks = {name: serving.blocks_of(model, POOLS[name], options.dtype) for name in names}
    result: dict[str, Any] = {
        "about": about(options) | {"model": SIZES[size]},
        "pools": {name: asdict(POOLS[name]) | blocks[name].as_json() for name in names},
        "cases": {name: asdict(case) for name, case in cases.items()},
        "runs": {name: {side: [] for side in case.sides} for name, case in cases.items()},
    }
    folder = REPOSITORY / "build" / "bench-load"
    folder.mkdir(parents=True, exist_ok=True)
    for repeat in range(options.repeats):
        for pool in names:
            for side in options.sides:
                served = {
                    name: case
                    for name, case in cases.items()
                    if case.pool == pool and side in case.sides
                }
                print(f"round {repeat + 1} of {options.repeats}: {side}, pool {pool}", flush=True)
                found = serving.serve(
                    side,
                    blocks[pool],
                    served,
                    model,
                    dtype=options.dtype,
                    seed=1000 * repeat,
                    folder=folder,
                )
                for name, figures in found.items():
                    result["runs"][name][side].append(figures)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "command": " ".join(["python -m benchmarks.bench_load", *sys.argv[1:]]),
        "commit": current_commit(),
        "machine": machine(),
        "dtype": options.dtype,
        "page_tokens": serving.PAGE_TOKENS,
        "chunk_tokens": serving.CHUNK_TOKENS,
        "batch_tokens": serving.BATCH_TOKENS,
        "max_num_seqs": serving.MAX_SEQS,
    }


if __name__ == "__main__":
    main()
