"""One server under `vllm bench serve`: the case's requests, and what `/metrics` says meanwhile."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.metrics_page import CACHED, PREEMPTIONS, Watch

if TYPE_CHECKING:
    from benchmarks.load.cases import Case
    from benchmarks.server import Server

REPOSITORY = Path(__file__).parents[2]
WARM_UP_PROMPTS = 2
# of the client's result, as the results file names them
FIGURES = {
    "seconds": "duration",
    "completed": "completed",
    "failed": "failed",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
    "ttft_median_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_median_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}
# sums over requests, which tell where the time of a run went
SPENT = {
    "queue_seconds": "vllm:request_queue_time_seconds_sum",
    "prefill_seconds": "vllm:request_prefill_time_seconds_sum",
    "decode_seconds": "vllm:request_decode_time_seconds_sum",
    # of the host, once for each compression; ours alone
    "compression_seconds": "vllm:budgetkv_compression_seconds_sum",
}


def client_command(case: Case, model: str, url: str, *, seed: int, result: Path) -> list[str]:
    """`vllm bench serve` for a case."""
    backend = ("openai-chat", "/v1/chat/completions") if case.is_chat else ("openai", None)
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--model", model]
    command += ["--base-url", url, "--backend", backend[0], *case.dataset]
    command += ["--endpoint", backend[1]] if backend[1] else []
    command += ["--extra-body", f'{{"media_io_kwargs": {case.media}}}'] if case.media else []
    command += [
        *("--num-prompts", str(case.prompts), "--max-concurrency", str(case.concurrency)),
        *("--random-output-len", str(case.output_tokens), "--ignore-eos", "--temperature", "0"),
        *("--seed", str(seed), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
        *("--save-result", "--save-detailed", "--disable-tqdm"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]
    return command


def run_client(case: Case, model: str, url: str, *, seed: int, result: Path) -> dict[str, Any]:
    """Sends the requests and reads what the client saved.

    Raises:
        RuntimeError: the client failed; with the end of its errors.
    """
    result.unlink(missing_ok=True)
    command = client_command(case, model, url, seed=seed, result=result)
    done = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not result.exists():
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def run_case(server: Server, case: Case, model: str, *, seed: int, folder: Path) -> dict[str, Any]:
    """Figures of one case on a server that is warm.

    What earlier requests left in vLLM's prefix cache is forgotten first.
    """
    forget(server.url)
    with Watch(server.url) as watch:
        found = run_client(case, model, server.url, seed=seed, result=folder / "client.json")
    return figures(found, watch)


def figures(found: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """What the results file keeps of a run: the client's figures and the server's.

    Args:
        found: result of `vllm bench serve`, with its details.
        watch: of the server's metrics meanwhile.
    """
    answers = zip(found["input_lens"], found["errors"], strict=True)
    # nothing was answered: the row says so
    prompts = [tokens for tokens, wrong in answers if not wrong] or [0]
    return {name: found[theirs] for name, theirs in FIGURES.items()} | {
        "prompt_tokens": [min(prompts), statistics.median(prompts), max(prompts)],
        "output_tokens": found["total_output_tokens"],
        "errors": sorted({error[-300:] for error in found["errors"] if error}),
        "running_most": int(max(watch.running, default=0)),
        "running_mean": statistics.fmean(watch.running) if watch.running else 0.0,
        "looks": len(watch.running),
        "preemptions": int(watch.grown(PREEMPTIONS)),
        "cached_tokens": int(watch.grown(CACHED)),
        "pool_usage_most": watch.usage,
        "spent": {name: round(watch.grown(theirs), 3) for name, theirs in SPENT.items()},
    }


def warm_up(server: Server, cases: list[Case], model: str, *, folder: Path) -> None:
    """A few requests of each kind of prompt; their seed is none of the measured ones."""
    for kind in {case.is_chat: case for case in cases}.values():
        short = replace(kind, prompts=WARM_UP_PROMPTS, concurrency=WARM_UP_PROMPTS, output_tokens=4)
        run_client(short, model, server.url, seed=10**6, result=folder / "client.json")


def forget(url: str) -> None:
    """Empties the prefix cache; needs VLLM_SERVER_DEV_MODE.

    Raises:
        RuntimeError: blocks were still held.
    """
    request = urllib.request.Request(f"{url}/reset_prefix_cache", method="POST")
    with urllib.request.urlopen(request, timeout=60.0) as answer:
        if not json.load(answer)["success"]:
            raise RuntimeError(f"blocks are held on {url} though no request runs")
