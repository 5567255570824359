"""A server never outlives its worker."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

# a server that has started an engine, and ends on SIGINT without ending it
SERVER = """
import signal, subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(engine.pid, flush=True)
if "stubborn" in sys.argv: signal.signal(signal.SIGINT, signal.SIG_IGN)
if "ends" in sys.argv: sys.exit(3)
time.sleep(600)
"""
# a worker: it starts the keeper, and is killed
WORKER = """
import subprocess, sys, time
keeper = subprocess.Popen(
    [sys.executable, "-m", "vllm_budgetkv.batch.keeper", *sys.argv[1:]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
)
print(len(keeper.stdout.read()), flush=True)
"""
WAIT_SECONDS = 60.0


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def started(*words: str) -> tuple[subprocess.Popen[str], int]:
    """A worker, and the process of its engine."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, sys.executable, "-c", SERVER, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stderr is not None
    return worker, int(worker.stderr.readline())


@pytest.mark.parametrize("words", [(), ("ends",)])
def test_all_ends_with_the_worker_or_with_the_server(words: tuple[str, ...]) -> None:
    """Bug: Ray kills a worker's children, so a keeper that was one ended before it could end."""
    worker, engine = started(*words)
    if words:
        assert worker.communicate(timeout=WAIT_SECONDS)[0] == "0\n", "it waits for the keeper's end"
    else:
        assert is_alive(engine)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        assert not any(is_alive(int(child)) for child in children)
        worker.kill()
        worker.communicate(timeout=WAIT_SECONDS)
    deadline = time.monotonic() + WAIT_SECONDS
    while is_alive(engine):
        assert time.monotonic() < deadline, "the engine outlived its worker"
        time.sleep(0.05)
