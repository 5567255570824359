"""A second question on a video, and decode with recall: `python -m benchmarks.bench_reuse`.

    python -m benchmarks.bench_reuse [--repeats 3] [--sizes 8000] [--sides stock host] [--out FILE]

Engines take turns: stock vLLM with its prefix cache, ours under a tenth of the longest prompt, and
ours with host memory behind it, where the question's chunks attend to all of the prompt ("host"),
no chunk does ("held"), or every chunk does ("all"). Each serves a video with a question, alone, and
then further questions on the same video. Every figure is the median over the repeats of a ratio of
two sides, and each side's that of the first question, or the median over those behind it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.bench import MODEL, REPOSITORY, RESULTS
from vllm_budgetkv.testing.models import build_qwen2_5_vl

HOST_MEMORY = "2GiB"
SIDES: dict[str, dict[str, Any]] = {
    "stock": {},
    "ours": {},
    "host": {"host_memory": HOST_MEMORY},
    "held": {"host_memory": HOST_MEMORY, "recall_prefill": "none"},
    "all": {"host_memory": HOST_MEMORY, "recall_prefill": "all"},
}
FIRST, LATER = 0, 1
# (figure, side and question above, side and question below)
RATIOS = {
    "second question / first, host": ("prefill_seconds", "host", LATER, "host", FIRST),
    "second question, host / stock": ("prefill_seconds", "host", LATER, "stock", LATER),
    "first question, host / ours": ("prefill_seconds", "host", FIRST, "ours", FIRST),
    "first question, host / stock": ("prefill_seconds", "host", FIRST, "stock", FIRST),
    "first question, held / ours": ("prefill_seconds", "held", FIRST, "ours", FIRST),
    "first question, host / held": ("prefill_seconds", "host", FIRST, "held", FIRST),
    "first question, all / held": ("prefill_seconds", "all", FIRST, "held", FIRST),
    "first question, all / stock": ("prefill_seconds", "all", FIRST, "stock", FIRST),
    "second question, held / stock": ("prefill_seconds", "held", LATER, "stock", LATER),
    "second question, host / held": ("prefill_seconds", "host", LATER, "held", LATER),
    "second question, all / stock": ("prefill_seconds", "all", LATER, "stock", LATER),
    "decode, host / stock": ("decode_ms", "host", LATER, "stock", LATER),
    "decode, host / ours": ("decode_ms", "host", LATER, "ours", LATER),
}


def main() -> None:
    options = parse_arguments()
    model = build_qwen2_5_vl(REPOSITORY / "build" / "models", **MODEL)
    runs = []
    for repeat in range(options.repeats):
        found = {}
        for side in options.sides:
            print(f"repeat {repeat + 1} of {options.repeats}: {side}", flush=True)
            found[side] = bench.measure(
                model,
                "stock" if side == "stock" else "ours",
                options,
                budget=SIDES[side],
                questions=options.questions,
                enable_prefix_caching=side == "stock",
            )
        runs.append(found)
    result = {
        "about": bench.about(options) | {"command": command(options), "host_memory": HOST_MEMORY},
        "ratios": {str(size): ratios(runs, str(size)) for size in options.sizes},
        "runs": runs,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"], indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A second question on one video.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8000])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--questions", type=int, default=2, help="on each video (default: 2)")
    parser.add_argument("--dtype", default="float32", help="of model and cache")
    file = RESULTS / "bench_reuse.json"
    parser.add_argument("--out", type=Path, default=file, help="file of the results")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    return " ".join(["python -m benchmarks.bench_reuse", *sys.argv[1:]])


def ratios(runs: list[dict[str, Any]], size: str) -> dict[str, float]:
    """Medians over the repeats."""

    def ratio(run: dict[str, Any], name: str) -> float:
        figure, above, first, below, second = RATIOS[name]
        values = []
        for side, which in ((above, first), (below, second)):
            questions = [question[figure] for question in run[side][size]]
            later = statistics.median(questions[1:])
            values.append(questions[0] if which == FIRST else later)
        return values[0] / values[1]

    measured = [name for name, (_, *sides) in RATIOS.items() if {*sides[::2]} <= runs[0].keys()]
    return {
        name: round(statistics.median(ratio(run, name) for run in runs), 3) for name in measured
    }


if __name__ == "__main__":
    main()
