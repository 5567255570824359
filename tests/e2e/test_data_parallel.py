"""A server of two data-parallel ranks: each holds its requests to their quota, and says so."""

from __future__ import annotations

import os
import re
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.server import Server
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS, VIDEO, ask, wait_until_idle

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

RANKS = 2
# it is five processes, each of which imports vLLM, on the cores that there are
START_TIMEOUT_S = 600.0
VIDEOS = 4
TEXT = [{"text": "Hi"}]


def of_ranks(server: Server, name: str) -> dict[str, float]:
    """A metric by its label `engine`, summed over all others."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as page:
        text = page.read().decode()
    found: dict[str, float] = defaultdict(float)
    for engine, value in re.findall(rf'^{name}\{{.*engine="(\d+)".*\}} (\S+)$', text, re.MULTILINE):
        found[engine] += float(value)
    return dict(found)


def test_two_ranks_answer_inside_the_quota(tmp_path: Path, vision_model: Path) -> None:
    arguments = [*ARGUMENTS, "--data-parallel-size", str(RANKS)]
    # by itself each rank would take the same cores
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log_file = tmp_path / "server.log"
    with Server(str(vision_model), arguments, log_file, environment, START_TIMEOUT_S) as server:
        client = server.client()

        def answer(parts: list[dict[str, Any]]) -> Any:
            return ask(client, parts)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(answer, [VIDEO] * VIDEOS + [TEXT] * 2))
        wait_until_idle(server)
        requests = of_ranks(server, "vllm:budgetkv_requests_total")
        peaks = of_ranks(server, "vllm:budgetkv_request_peak_blocks_sum")
        log = server.log.read_text(encoding="utf-8", errors="replace")
    reports = [found.kv_transfer_params["budgetkv"] for found in answers]
    videos = reports[:VIDEOS]
    assert {report["peak_blocks"] for report in videos} == {QUOTA_BLOCKS}
    assert all(report["full_cache_blocks"] > 8 * QUOTA_BLOCKS for report in videos)
    for several in (answers[:VIDEOS], answers[VIDEOS:]):
        assert len({found.choices[0].message.content for found in several}) == 1
    assert set(requests) == {str(rank) for rank in range(RANKS)}
    assert all(requests.values()), "both ranks must have answered"
    assert sum(requests.values()) == len(answers)
    assert sum(peaks.values()) == sum(report["peak_blocks"] for report in reports)
    assert "Traceback" not in log
