"""A server under sixteen clients for an hour: does its memory stay? `python -m benchmarks.soak`.

    python -m benchmarks.soak [--minutes 60] [--host-memory 64MiB] [--out FILE]

The small model of the suite under a quota, every page table checked after every step. Clients send
text, pictures and videos, leave before the answer or in the middle of it, and send bodies that are
wrong; one of their processes after the other is killed and another started. Each process of the
server is looked at every ten seconds. Exits with 1 unless all of `verdicts` hold.

glibc keeps much of what is freed, the more the longer; to see what the server itself keeps, tell it
not to: `MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.soak`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import bench_table, metrics_page
from benchmarks.bench import REPOSITORY, RESULTS
from benchmarks.quality import reader
from benchmarks.quality.provenance import current_commit, machine
from benchmarks.server import Server
from benchmarks.soaking import memory, outcome
from benchmarks.soaking.memory import Memory

FILE = RESULTS / "soak.json"
WORK = REPOSITORY / "build" / "soak"
CLIENTS, CLIENT_THREADS = 4, 4
RESTART_S = 60.0
ARGUMENTS = [
    *("--dtype", "float32", "--enforce-eager", "--block-size", "16", "--max-model-len", "8192"),
    # some requests wait for blocks, and some are preempted
    *("--max-num-seqs", "16", "--num-gpu-blocks-override", "240", "--skip-mm-profiling"),
    *("--media-io-kwargs", json.dumps({"video": {"num_frames": -1}})),
    *("--limit-mm-per-prompt", json.dumps({"image": 1, "video": 1})),
    # full within minutes, so that what comes later is growth
    *("--mm-processor-cache-gb", "0.05"),
    *("--kv-policy", "hybrid", "--kv-page-quota", "28", "--kv-chunk-tokens", "128"),
    *("--kv-max-page-quota", "32", "--kv-request-policies", "full,window", "--kv-check-ledger"),
]


def main() -> int:
    options = parse_arguments()
    result = soak(options)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(outcome.table(result))
    if options.out == FILE:
        bench_table.replace(REPOSITORY / "docs" / "performance.md", "soak", outcome.table(result))
    return 0 if all(result["verdicts"].values()) else 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A server under load for an hour.")
    parser.add_argument("--minutes", type=float, default=60.0, help="default: 60")
    parser.add_argument("--period", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--host-memory", help="--kv-host-memory of the server")
    parser.add_argument("--seed", type=int, default=0, help="of what clients send")
    parser.add_argument("--out", type=Path, default=FILE, help="file of the result")
    return parser.parse_args(arguments)


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Starts the server, lets the clients loose, and asks what is left behind."""
    WORK.mkdir(parents=True, exist_ok=True)
    for file in WORK.glob("client-*"):
        file.unlink()
    host = ["--kv-host-memory", options.host_memory] if options.host_memory else []
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    model = str(reader.FOLDER)
    with Server(model, [*ARGUMENTS, *host], WORK / "server.log", environment) as server:
        watched = Memory(server.process.pid)
        restarts, usage = under_load(server, model, watched, options)
        seconds = time.monotonic() - watched.start
        after = outcome.settled(server.url, model)
    found = {
        "about": {
            "command": command(),
            "commit": current_commit(),
            "machine": machine(),
            "arguments": [*ARGUMENTS, *host],
            "clients": CLIENTS * CLIENT_THREADS,
            "rule": memory.RULE,
        },
        "seconds": round(seconds, 1),
        "processes": [memory.judge(process, seconds) for process in watched.processes.values()],
        "client_restarts": restarts,
        "pool_usage_most": usage,
        "requests": outcome.counted(WORK),
        "server": after,
        "log_errors": outcome.errors_of(WORK / "server.log"),
    }
    return found | {"verdicts": outcome.verdicts(found)}


def command() -> str:
    """With the variables of glibc's allocator, which decide what a process holds."""
    allocator = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if "MALLOC_" in name]
    return " ".join([*allocator, "python -m benchmarks.soak", *sys.argv[1:]])


def under_load(
    server: Server, model: str, watched: Memory, options: argparse.Namespace
) -> tuple[int, float]:
    """Runs the clients until the time is over; looks at memory and metrics meanwhile.

    Returns:
        How often a client was killed and started again, and the largest share of the pool in use.
    """
    started, usage = 0, 0.0
    deadline = time.monotonic() + 60 * options.minutes
    with ExitStack() as stack:
        clients: list[subprocess.Popen[bytes]] = []
        for _ in range(CLIENTS):
            clients.append(start_client(stack, server, model, options.seed + started, started))
            started += 1
        next_restart = time.monotonic() + RESTART_S
        while time.monotonic() < deadline:
            time.sleep(min(options.period, max(0.0, deadline - time.monotonic())))
            watched.look()
            page = metrics_page.read_page(server.url)
            usage = max(usage, metrics_page.total(page, metrics_page.USAGE))
            if ended := [client.poll() for client in clients if client.poll() is not None]:
                raise RuntimeError(f"a client ended by itself with {ended}: see {WORK}")
            if time.monotonic() >= next_restart:
                stop_client(clients.pop(0))
                seed = options.seed + started
                clients.append(start_client(stack, server, model, seed, started))
                started += 1
                next_restart += RESTART_S
    return started - CLIENTS, usage


def start_client(
    stack: ExitStack, server: Server, model: str, seed: int, number: int
) -> subprocess.Popen[bytes]:
    """A process of clients; it ends with the stack at the latest."""
    command = [sys.executable, "-m", "benchmarks.soaking.client", "--url", server.url]
    command += ["--model", model, "--seed", str(seed), "--threads", str(CLIENT_THREADS)]
    command += ["--out", str(WORK / f"client-{number}.jsonl")]
    log = stack.enter_context((WORK / f"client-{number}.log").open("w"))
    client = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
    stack.callback(stop_client, client)
    return client


def stop_client(client: subprocess.Popen[bytes]) -> None:
    """As a client that crashes: it says nothing to the server."""
    if client.poll() is None:
        client.kill()
        client.wait()


if __name__ == "__main__":
    sys.exit(main())
