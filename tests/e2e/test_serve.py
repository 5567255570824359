"""A real server and OpenAI clients: streams, concurrency, clients that leave, honest metrics."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from benchmarks.server import Server
from tests.e2e.job import content_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openai import OpenAI

pytestmark = pytest.mark.engine

QUOTA_BLOCKS = 12
ARGUMENTS = [
    *("--dtype", "float32", "--enforce-eager", "--block-size", "8"),
    *("--max-model-len", "16384", "--num-gpu-blocks-override", "60", "--max-num-seqs", "8"),
    *("--media-io-kwargs", json.dumps({"video": {"num_frames": -1}})),
    *("--kv-policy", "hybrid", "--kv-page-quota", str(QUOTA_BLOCKS), "--kv-chunk-tokens", "24"),
    *("--kv-decode-interval-tokens", "8", "--kv-window-tokens", "8", "--kv-check-ledger"),
]
VIDEO = [{"video": 96}, {"text": "Which letter does the sign show?"}]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "report.jsonl"


@pytest.fixture(scope="module")
def server(vision_model: Path, report: Path) -> Iterator[Server]:
    arguments = [*ARGUMENTS, "--kv-report-file", str(report)]
    log = report.with_name("server.log")
    with Server(str(vision_model), arguments, log, dict(os.environ)) as running:
        yield running


def ask(client: OpenAI, parts: list[dict[str, Any]], max_tokens: int = 12, **extra: Any) -> Any:
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [content_of(part) for part in parts]}],
        max_tokens=max_tokens,
        temperature=0.0,
        extra_body={"ignore_eos": True},
        **extra,
    )


def metric(server: Server, name: str) -> float:
    """Sum of a metric over its labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as page:
        text = page.read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"{name} is not in /metrics"
    return sum(map(float, values))


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "the server did not become idle"
        time.sleep(0.2)


def test_the_banner_says_what_was_resolved(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8", errors="replace")
    (line,) = [line for line in log.splitlines() if "budgetkv: policy" in line]
    assert "policy hybrid, quota 12 blocks of 8 tokens (96 tokens per head" in line
    assert "5.0 requests at quota fit the pool of 60 blocks" in line


def test_streaming_many_at_once_counts_only_clients(server: Server, report: Path) -> None:
    client = server.client()
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [metric(server, name) for name in (*names, "vllm:request_success_total")]
    contents = [VIDEO, [{"text": "Hi"}], [{"image": 2}, {"text": "Where?"}], VIDEO, VIDEO]

    def stream(parts: list[dict[str, Any]]) -> tuple[int, int, int]:
        events = ask(client, parts, stream=True, stream_options={"include_usage": True})
        chunks, usage = 0, None
        for event in events:
            chunks += bool(event.choices and event.choices[0].delta.content)
            usage = event.usage or usage
        assert usage is not None
        return usage.prompt_tokens, usage.completion_tokens, chunks

    with ThreadPoolExecutor(len(contents)) as pool:
        found = list(pool.map(stream, contents))
    assert found[0][0] > 60 * 8, "the video must not fit the pool"
    assert all(completion == 12 and chunks > 1 for _, completion, chunks in found)
    wait_until_idle(server)
    after = [metric(server, name) for name in (*names, "vllm:request_success_total")]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [sum(f[0] for f in found), sum(f[1] for f in found), len(contents)]
    records = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(contents)
    for record in records:
        assert record["peak_blocks"] <= QUOTA_BLOCKS
        assert record["full_cache_blocks"] > QUOTA_BLOCKS or not record["compressions"]


def test_equal_questions_get_equal_answers_alone_and_in_a_crowd(server: Server) -> None:
    client = server.client()
    alone = ask(client, VIDEO).choices[0].message.content
    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(lambda _: ask(client, VIDEO).choices[0].message.content, range(4)))
    assert crowd == [alone] * 4


def test_clients_that_leave_take_everything_with_them(server: Server) -> None:
    """Leave during the look-ahead, in mid-prefill and in decode."""
    client = server.client()
    usage = "vllm:kv_cache_usage_perc"
    for wait_seconds in (0.0, 0.05, 0.15, 0.4):
        leaving = threading.Event()

        def stay(event: threading.Event = leaving) -> None:
            stream = ask(client, [{"video": 192}, {"text": "What?"}], max_tokens=400, stream=True)
            event.wait(30)
            stream.close()

        thread = threading.Thread(target=stay)
        thread.start()
        time.sleep(wait_seconds)
        leaving.set()
        thread.join(60)
        assert not thread.is_alive()
    wait_until_idle(server)
    assert metric(server, usage) == 0
    assert ask(client, [{"text": "Hi"}]).usage.completion_tokens == 12


def test_a_bad_request_is_the_clients_error(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError):
        ask(client, [{"text": "word " * 40000}])
    assert ask(client, [{"text": "Hi"}]).usage.completion_tokens == 12
