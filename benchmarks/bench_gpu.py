"""Engines on a GPU: `python -m benchmarks.bench_gpu [--sizes 30000] [--sides stock ours host]`.

A model of the size of Qwen2.5-VL-7B's language model, 28 layers of 4 KV heads of 128, with vLLM's
dummy weights and a small vision tower: what is timed is the language model, and no answer means
anything. Engines take turns: stock vLLM as it starts by itself, with its prefix cache; ours under a
tenth of the prompt; ours with host memory behind it. Each serves a video with a question, alone,
and then further questions on the same video; decode steps are replayed from CUDA graphs on all
sides. Ratios are of medians over the repeats.

With `--layers 2` and the like it runs anywhere, which tells that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench
from benchmarks.bench import MAX_SEQS, REPOSITORY, RESULTS
from benchmarks.kernels.report import card
from vllm_budgetkv.testing import models, shapes, tokenizer
from vllm_budgetkv.testing.shapes import DecoderShape, VisionShape

SHAPE = {
    "layers": 28,
    "hidden": 3584,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "intermediate": 18944,
    "vocab_size": 152064,
}
VISION = VisionShape(depth=2, width=64)
HOST_MEMORY = "8GiB"
SIDES: dict[str, dict[str, Any]] = {
    "stock": {},
    "ours": {},
    "host": {"host_memory": HOST_MEMORY},
}
# what vLLM takes for a prompt in a step on such a card, where nobody says
STOCK_BATCH_TOKENS = 8192
# of PyTorch alone: the figures are of the attention and its cache, not of a compiler
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, MAX_SEQS],
}


def main() -> None:
    options = parse_arguments()
    model = write_model(SHAPE | {"layers": options.layers})
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        found = {}
        for side in options.sides:
            print(f"repeat {repeat + 1} of {options.repeats}: {side}", flush=True)
            found[side] = measure(model, side, options)
            print(json.dumps(found[side]), flush=True)
        runs.append(found)
    result = {"about": about(options), "ratios": ratios(runs, options), "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stock vLLM against a tenth of its KV cache.")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side (default: 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[30000], help="prompts, in tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--questions", type=int, default=3, help="on each video (default: 3)")
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--dtype", default="bfloat16", help="of model and cache")
    file = RESULTS / "bench_gpu.json"
    parser.add_argument("--out", type=Path, default=file, help="file of the results")
    return parser.parse_args()


def write_model(sizes: dict[str, int]) -> Path:
    """The folder of a Qwen2.5-VL of these sizes, which has no weights."""
    shape = DecoderShape(**sizes, dtype="bfloat16")

    def write(folder: Path) -> None:
        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        config = models.qwen2_5_vl_config(shape, VISION, vocabulary)
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        config.save_pretrained(folder)
        models.build_processor(vocabulary).save_pretrained(folder)

    name = shapes.fingerprint("unweighted", shape, VISION, source=models.source())
    return models.cached(REPOSITORY / "build" / "models", name, write)


def measure(model: Path, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side by size, from an engine for each, whose quota is a tenth of it."""
    found: dict[str, Any] = {}
    stock = {"max_num_batched_tokens": STOCK_BATCH_TOKENS}
    on_gpu = {
        "enforce_eager": False,
        "compilation_config": GRAPHS,
        "gpu_memory_utilization": 0.85,
    }
    for size in options.sizes:
        found |= bench.measure(
            model,
            "stock" if side == "stock" else "ours",
            argparse.Namespace(sizes=[size], dtype=options.dtype),
            budget={"unproven_device": True, **SIDES[side]},
            questions=options.questions,
            enable_prefix_caching=side == "stock",
            load_format="dummy",
            **(on_gpu if torch.cuda.is_available() else {}),
            **(stock if side == "stock" else {}),
        )
    return found


def ratios(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """By size and side: stock's figure is 1."""

    def median(side: str, size: int, figure: str, *, first: bool) -> float:
        per_run = []
        for run in runs:
            questions = [question[figure] for question in run[side][str(size)]]
            per_run.append(questions[0] if first else statistics.median(questions[1:]))
        return statistics.median(per_run)

    found: dict[str, Any] = {}
    for size in options.sizes if "stock" in options.sides else []:
        for side in options.sides[1:]:
            ratio = {
                f"{words} / stock": median(side, size, figure, first=first)
                / median("stock", size, figure, first=first)
                for words, figure, first in (
                    ("first token, first question", "prefill_seconds", True),
                    ("first token, further question", "prefill_seconds", False),
                    ("further token", "decode_ms", False),
                    ("KV bytes", "kv_bytes", True),
                )
            }
            found[f"{side}, {size} tokens"] = {name: round(x, 3) for name, x in ratio.items()}
    return found


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    return bench.about(argparse.Namespace(sizes=options.sizes, dtype="", repeats=0)) | {
        "command": " ".join(["python -m benchmarks.bench_gpu", *sys.argv[1:]]),
        "card": card(),
        "torch": torch.__version__,
        "model": SHAPE | {"layers": options.layers},
        "host_memory": HOST_MEMORY,
    }


if __name__ == "__main__":
    main()
