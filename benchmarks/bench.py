"""`make bench`: stock vLLM and ours in turn on one model; one JSON, two plots, the README's table.

    python -m benchmarks.bench [--repeats 3] [--sizes 2000 8000 16000 30000] [--dtype bfloat16]

Both sides serve the same prompts, a rendered video and a question behind it, alone in the engine.
The quota is a tenth of the longest prompt. Every figure is the median of the repeats, in which the
two sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench_plots, bench_table
from vllm_budgetkv.arithmetic.quota import least_batch_tokens
from vllm_budgetkv.testing.models import build_qwen2_5_vl

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
MODEL = {
    "layers": 8,
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 64,
    "intermediate": 2048,
}
PAGE_TOKENS = 32
CHUNK_TOKENS = 1024
MAX_SEQS = 8
OUTPUT_TOKENS = 48
REPORTED = ("compression_seconds", "compressions", "reused_tokens", "recall_steps", "moved_bytes")
QUOTA_SHARE = 0.1


def main() -> None:
    options = parse_arguments()
    model = build_qwen2_5_vl(REPOSITORY / "build" / "models", **MODEL)
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    for repeat in range(options.repeats):
        for side, answers in runs.items():
            print(f"repeat {repeat + 1} of {options.repeats}: {side}", flush=True)
            answers.append(first_questions(measure(model, side, options)))
    result = {
        "about": about(options),
        "engine": {side: summarise(answers) for side, answers in runs.items()},
        "kernels": {
            "attention": last_json("benchmarks.bench_attention", "--repeats", "5"),
            "ops": last_json("benchmarks.bench_ops"),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bench_plots.draw(result, RESULTS)
    bench_table.write(result, REPOSITORY)
    print(bench_table.table(result))
    print(json.dumps(result["engine"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stock vLLM against a tenth of its KV cache.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 8000, 16000, 30000])
    parser.add_argument("--dtype", default="bfloat16", help="of model and cache")
    return parser.parse_args()


def quota_tokens(options: argparse.Namespace) -> int:
    return int(QUOTA_SHARE * max(options.sizes))


def first_questions(answer: dict[str, Any]) -> dict[str, Any]:
    return {size: found[0] for size, found in answer.items()}


def measure(
    model: Path,
    side: str,
    options: argparse.Namespace,
    *,
    budget: dict[str, Any] | None = None,
    questions: int = 1,
    **changes: Any,
) -> dict[str, list[dict[str, Any]]]:
    """One engine of one side in a process of its own.

    Args:
        model: folder.
        side: "stock" or "ours".
        options: of the command line.
        budget: further options of ours.
        questions: asked one after the other on each video.
        changes: further arguments of the engine.

    Returns:
        Figures of every question by prompt size.
    """
    engine: dict[str, Any] = {
        "model": str(model),
        "dtype": options.dtype,
        "enforce_eager": True,
        # vLLM sizes its encoder cache by the longest video that fits, in powers of two
        "max_model_len": 1 << (max(options.sizes) + OUTPUT_TOKENS).bit_length(),
        "block_size": PAGE_TOKENS,
        "max_num_batched_tokens": least_batch_tokens(CHUNK_TOKENS, MAX_SEQS),
        "max_num_seqs": MAX_SEQS,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "limit_mm_per_prompt": {"video": 1},
        # it sizes nothing here, and runs the vision tower over the longest video that fits
        "skip_mm_profiling": True,
        **changes,
    }
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": str(REPOSITORY),
    }
    report = REPOSITORY / "build" / "bench-report.jsonl"
    report.unlink(missing_ok=True)
    if side == "stock":
        environment["VLLM_PLUGINS"] = ""
    else:
        engine["additional_config"] = {
            "budgetkv": {
                "policy": "hybrid",
                "quota_tokens": quota_tokens(options),
                "chunk_tokens": CHUNK_TOKENS,
                "report_file": str(report),
                **(budget or {}),
            }
        }
    job = {"engine": engine, "sizes": options.sizes, "output_tokens": OUTPUT_TOKENS}
    job["questions"] = questions
    answer = json_of([sys.executable, "-m", "benchmarks.measure"], environment, json.dumps(job))
    records = {}
    if side == "ours":
        lines = report.read_text(encoding="utf-8").splitlines()
        records = {record["request_id"].split("-")[0]: record for record in map(json.loads, lines)}
    for size, several in answer["sizes"].items():
        for number, found in enumerate(several):
            record = records.get(f"n{size}q{number}")
            found["kv_bytes"] = (
                record["kv_bytes"] if record else found["peak_blocks"] * answer["block_bytes"]
            )
            for name in REPORTED:
                found[name] = record[name] if record else 0
    return answer["sizes"]


def summarise(answers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median of every figure over the repeats, by prompt size."""
    return {
        size: {
            name: statistics.median(answer[size][name] for answer in answers)
            for name in answers[0][size]
        }
        for size in answers[0]
    }


def last_json(module: str, *arguments: str) -> Any:
    print(f"kernels: {module}", flush=True)
    return json_of([sys.executable, "-m", module, *arguments], dict(os.environ), "")


def json_of(command: list[str], environment: dict[str, str], text: str) -> Any:
    """The last line that a command prints, as JSON.

    Raises:
        RuntimeError: the command failed; with the end of its errors.
    """
    done = subprocess.run(
        command,
        input=text,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from: command, commit, machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = cpuinfo.split("model name")[1].splitlines()[0].strip(" :\t")
    arguments = f"--repeats {options.repeats} --dtype {options.dtype}"
    return {
        "command": f"python -m benchmarks.bench {arguments}",
        "commit": commit or "unknown",
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()}",
        "model": MODEL,
        "quota_tokens": quota_tokens(options),
        "page_tokens": PAGE_TOKENS,
        "chunk_tokens": CHUNK_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }


if __name__ == "__main__":
    main()
