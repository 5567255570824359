"""The peers beside us: what they answer, how long they take and what they hold.

    python -m benchmarks.real.peers [--only accuracy|speed] [--count 5] [--sizes 2048 4096]
                                    [--repeats 3] [--jobs 2] [--out DIR] [--fresh]

Makes the peers' environments the first time. Answers that are finished are kept in
`build/real/peers/answers`; time and memory are measured anew, and need a machine that does nothing
else. Both become `real_peers.json` and tables of `docs/experiments.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality import models
from benchmarks.quality.provenance import current_commit, machine
from benchmarks.quality.queueing import Cache, Worker, run_all
from benchmarks.real import report, weights
from benchmarks.real.peers import accuracy, environments, speed
from benchmarks.real.peers.prompts import make_questions
from benchmarks.real.plan import SOLVED_TASKS
from benchmarks.real.run import DOCUMENT, RESULTS
from benchmarks.real.tasks import SUITE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("accuracy", "speed")
FILE = "real_peers.json"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = str(weights.model_folder())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for peer in ("kvpress", "openvino"):
        environments.python_of(peer)
    environments.exported_model(model)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    if "accuracy" in options.only:
        failed = ask(model, tokenizer, options)
    if "speed" in options.only:
        source = about(model)
        rows = speed.measure(model, options.sizes, options.repeats, tokenizer)
        save(options.out / FILE, "speed", source, rows)
    if options.out == RESULTS:
        report.write(options.out, DOCUMENT)
    print(report.summary(options.out))
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="kvpress, OpenVINO GenAI and vLLM beside us.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--count", type=int, default=5, help="examples of each task")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096], help="timed prompts")
    parser.add_argument("--repeats", type=int, default=3, help="timed processes of each system")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="ask finished jobs again")
    return parser.parse_args()


def about(model: str) -> dict[str, Any]:
    """Where the figures come from."""
    from importlib.metadata import version

    pins = environments.versions("kvpress") | {
        f"{name} (OpenVINO's)" if name == "transformers" else name: pin
        for name, pin in environments.versions("openvino").items()
    }
    return {
        "command": " ".join(["python -m benchmarks.real.peers", *sys.argv[1:]]),
        "commit": current_commit(),
        "machine": machine(),
        "model": weights.LABEL,
        "gguf_sha256": weights.GGUF.sha256,
        "fingerprint": models.fingerprint(model),
        "suite_seed": SUITE,
        "versions": pins | {"torch": version("torch"), "vllm": version("vllm")},
    }


def ask(model: str, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> int:
    """Asks all examples of both peers; returns how many jobs failed."""
    source = about(model)
    length, count = accuracy.LENGTH_TOKENS, options.count
    questions = [asdict(q) for q in make_questions(SOLVED_TASKS, length, count, tokenizer)]
    folder = environments.ENVIRONMENTS / "answers"
    cache = Cache(folder, source["fingerprint"], accuracy.Answers, fresh=options.fresh)
    measure = partial(accuracy.measure, model=model, questions=questions, commit=source["commit"])
    workers = [Worker(lambda: ThreadPoolExecutor(1)) for _ in range(options.jobs)]
    found, errors = run_all(accuracy.jobs(count), cache, measure, workers, "peers")
    for worker in workers:
        worker.close()
    rows = [row | {"commit": answers.commit} for answers in found for row in answers.rows]
    save(options.out / FILE, "accuracy", source, rows)
    return len(errors)


def save(file: Path, part: str, source: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Replace one part of the results."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content[part] = {"about": source, "rows": rows}
    text = json.dumps({name: content[name] for name in PARTS if name in content}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
