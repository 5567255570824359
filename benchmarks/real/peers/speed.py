"""Time and memory of all systems beside each other: each in a process of its own, by turns."""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.real.packages import FOLDER
from benchmarks.real.peers import environments
from benchmarks.real.peers.accuracy import BLOCK_TOKENS
from benchmarks.real.peers.prompts import make_questions
from benchmarks.real.plan import CHUNK_TOKENS, DECODE_INTERVAL_TOKENS, PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

OUTPUT_TOKENS = 33
WARMUP_TOKENS = 256
SHARE = 0.1
# block 0 is vLLM's own
SPARE_BLOCKS = 2
# the least that vLLM's own attention takes on a CPU
STOCK_BLOCK_TOKENS = 32
REPORT = FOLDER / "peers" / "timed.jsonl"
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


@dataclass(frozen=True)
class System:
    """One line of the table.

    Args:
        name: of the line.
        peer: whose environment; empty for the project's own.
        options: of its process, see `job_of`.
    """

    name: str
    peer: str
    options: dict[str, Any]


SYSTEMS = (
    System("transformers", "kvpress", {"press": None}),
    System("kvpress SnapKV", "kvpress", {"press": "snapkv", "share": SHARE}),
    System("OpenVINO", "openvino", {"evicts": False}),
    System("OpenVINO, eviction", "openvino", {"evicts": True}),
    System("vLLM", "", {"budget": None}),
    System("hybrid", "", {"budget": "hybrid"}),
)


def measure(
    model: str, sizes: Sequence[int], repeats: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Medians of every system at every length; the systems take turns."""
    prompts = {size: make_questions(("single",), size, 1, tokenizer)[0].prompt for size in sizes}
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for size, prompt in prompts.items():
            for system in SYSTEMS:
                print(
                    f"repeat {repeat + 1} of {repeats}: {system.name}, {size:,} tokens", flush=True
                )
                sample = time_once(system, model, size, prompt)
                found.setdefault((system.name, size), []).append(sample)
    return [
        {"name": name, "length_tokens": size, "repeats": repeats} | medians(samples)
        for (name, size), samples in found.items()
    ]


def medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        key: round(statistics.median(sample[key] for sample in samples), 4) for key in samples[0]
    }


def time_once(system: System, model: str, size: int, prompt: list[int]) -> dict[str, float]:
    """One request in a new process, with all cores."""
    threads = os.cpu_count() or 1
    job = {"prompt": prompt, "warmup": prompt[:WARMUP_TOKENS], "output_tokens": OUTPUT_TOKENS}
    job |= job_of(system, model, size)
    if system.peer:
        python, module = environments.python_of(system.peer), f"{system.peer}_speed"
        (sample,) = environments.ask_process(python, module, job, threads)
    else:
        environment = dict(ENGINE_ENVIRONMENT)
        if not system.options["budget"]:
            environment["VLLM_PLUGINS"] = ""
        (sample,) = environments.ask_process(
            sys.executable, "engine_speed", job, threads, **environment
        )
    return sample


def job_of(system: System, model: str, size: int) -> dict[str, Any]:
    """What a system's process reads; quota or limit is a tenth of the length."""
    if system.peer == "kvpress":
        return system.options | {"model": model}
    tokens = int(SHARE * size)
    if system.peer == "openvino":
        return {
            "model": str(environments.exported_model(model)),
            "limit_tokens": tokens // BLOCK_TOKENS * BLOCK_TOKENS
            if system.options["evicts"]
            else 0,
            "crush_blocks": 0,
            "pool_blocks": (size + OUTPUT_TOKENS) // BLOCK_TOKENS + 2,
        }
    ours = system.options["budget"] is not None
    page_tokens = PAGE_TOKENS if ours else STOCK_BLOCK_TOKENS
    # a pool for this request alone, so that the process holds no more than it needs
    longest_tokens = (size + OUTPUT_TOKENS) // page_tokens * page_tokens + page_tokens
    held_tokens = tokens if ours else longest_tokens
    engine: dict[str, Any] = ENGINE | {"model": model, "max_model_len": longest_tokens}
    engine |= {"block_size": page_tokens}
    engine |= {"num_gpu_blocks_override": held_tokens // page_tokens + SPARE_BLOCKS}
    if ours:
        engine["additional_config"] = {
            "budgetkv": {
                "policy": system.options["budget"],
                "quota_tokens": tokens // PAGE_TOKENS * PAGE_TOKENS,
                "chunk_tokens": CHUNK_TOKENS,
                "decode_interval_tokens": DECODE_INTERVAL_TOKENS,
                "report_file": str(REPORT),
            }
        }
    return {"engine": engine, "report_file": str(REPORT)}
