"""The rule for memory, what clients send, and what is counted, of `benchmarks.soak`; no engine."""

from __future__ import annotations

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.soaking import client, memory, outcome
from benchmarks.soaking.bodies import Bodies, Sent
from benchmarks.soaking.memory import Memory, Process

if TYPE_CHECKING:
    from pathlib import Path

HOUR_S = 3600.0
LOOKS = 360


def process(grows_mib: float, noise_mib: float, *, looks: int = LOOKS) -> Process:
    """Of 500 MiB, that fills in its first minutes and then grows by `grows_mib` an hour."""
    chance = random.Random(1)
    found = Process("python")
    for look in range(looks):
        seconds = look * HOUR_S / LOOKS
        start_mib = 500 - 200 * max(0.0, 1 - seconds / 600)
        uss = start_mib + grows_mib * seconds / HOUR_S + chance.gauss(0, noise_mib)
        found.seconds.append(seconds)
        found.uss_mib.append(uss)
        found.rss_mib.append(uss + 100)
        found.files.append(9)
        found.threads.append(4)
    return found


@pytest.mark.parametrize(
    ("grows_mib", "noise_mib", "verdict"),
    [
        (0.0, 0.0, "flat"),
        (0.0, 5.0, "flat"),
        (10.0, 1.0, "flat"),
        (-50.0, 1.0, "flat"),
        (24.0, 1.0, "grows"),
        (90.0, 5.0, "grows"),
        # it may be flat, but such noise does not show it
        (0.0, 90.0, "unsure"),
    ],
)
def test_judge_by_the_slope_of_the_second_half(
    grows_mib: float, noise_mib: float, verdict: str
) -> None:
    found = memory.judge(process(grows_mib, noise_mib), HOUR_S)
    assert found["verdict"] == verdict
    assert found["limit_mib_per_hour"] == memory.LIMIT_MIB
    low, high = found["interval_mib_per_hour"]
    assert low - 0.01 <= grows_mib <= high + 0.01
    assert found["looks"] == LOOKS and len(found["uss_windows_mib"]) == 60


def test_a_process_that_ended_early_is_not_judged() -> None:
    assert memory.judge(process(0.0, 1.0, looks=100), HOUR_S)["verdict"] == "too short"


def test_fit_widens_for_residuals_that_agree() -> None:
    xs = [float(x) for x in range(30)]
    waves = [1.0 if x % 2 else -1.0 for x in range(30)]
    steps = [1.0 if x // 5 % 2 else -1.0 for x in range(30)]
    assert memory.fit(xs, [2 * x + 3 for x in xs]) == memory.Line(2.0, 0.0)
    assert memory.fit(xs, steps).margin > 2 * memory.fit(xs, waves).margin


@pytest.mark.parametrize(("freedom", "quantile"), [(8, 2.306), (28, 2.048), (120, 1.980)])
def test_student_as_in_tables(freedom: int, quantile: float) -> None:
    assert memory.student(freedom) == pytest.approx(quantile, abs=2e-3)


def test_looking_at_this_process() -> None:
    watched = Memory(psutil.Process().pid)
    watched.look()
    watched.look()
    found = watched.processes[psutil.Process().pid]
    assert len(found.uss_mib) == 2 and 1 < found.uss_mib[0] <= found.rss_mib[0]
    assert found.files[0] > 0 and found.threads[0] > 0


def test_bodies_are_of_every_kind_and_say_what_is_right() -> None:
    bodies = Bodies("model", random.Random(0))
    sent = [bodies.any() for _ in range(200)]
    assert {one.kind for one in sent} == {"text", "long text", "image", "video", "wrong", "asked"}
    for one in sent:
        assert (200 in one.expected) == (one.kind != "wrong")
        if one.kind != "wrong":
            assert json.loads(one.body)["model"] == "model"
    assert len({one.body for one in sent if one.kind == "wrong"}) > 5
    assert any(one.streams for one in sent) and not all(one.streams for one in sent)


@pytest.mark.parametrize(
    ("answer", "streams", "status", "right"),
    [
        (b"{}", False, 200, True),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', True, 200, True),
        (b'data: {"choices": []}\n\n', True, -1, False),
        (b'data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n', True, -1, False),
    ],
)
def test_a_stream_that_ends_in_an_error_is_no_answer(
    answer: bytes, streams: bool, status: int, right: bool
) -> None:
    """Status 200 is sent before the engine fails."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = client.send(url, Sent("text", "/", b"{}", streams=streams), None)
        thread.join()
    assert (found["status"], found["right"]) == (status, right)


def line(kind: str, status: int, right: bool) -> str:
    return json.dumps({"kind": kind, "status": status, "right": right}) + "\n"


def test_counting_leaves_out_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "client-0.jsonl").write_text(line("text", 200, True) + line("wrong", 400, True))
    (tmp_path / "client-1.jsonl").write_text(line("text", 500, False) + '{"kind": "te')
    (tmp_path / "client-2.jsonl").write_text("")
    found = outcome.counted(tmp_path)
    assert found["by_kind"] == {"text": {"200": 1, "500": 1}, "wrong": {"400": 1}}
    assert (found["total"], found["wrong"]) == (3, 1)
    assert found["examples"][0]["status"] == 500


def result(**changed: Any) -> dict[str, Any]:
    return {
        "about": {"command": "soak", "commit": "abc", "machine": "a machine", "clients": 16},
        "seconds": HOUR_S,
        "processes": [
            memory.judge(process(0.0, 1.0), HOUR_S),
            memory.judge(process(0.0, 1.0, looks=9), HOUR_S),
        ],
        "client_restarts": 59,
        "requests": {"by_kind": {"text, left": {"0": 4}, "wrong": {"400": 2}}, "total": 6}
        | {"wrong": 0},
        "server": {
            "left": {"vllm:kv_cache_usage_perc": 0.0},
            "health": 200,
            "last_answer": 200,
            "counted": {"vllm:num_preemptions_total": 3.0},
        },
        "log_errors": [],
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({}, None),
        ({"processes": [{"verdict": "flat"}, {"verdict": "unsure"}]}, "flat"),
        ({"processes": [{"verdict": "too short"}]}, "flat"),
        ({"requests": {"wrong": 1}}, "status"),
        ({"server": {"left": {"a": 0.1}, "health": 200, "last_answer": 200}}, "held"),
        ({"server": {"left": {"a": 0.0}, "health": 503, "last_answer": 200}}, "well"),
        ({"log_errors": ["RuntimeError: ledger"]}, "log"),
    ],
)
def test_verdicts(changed: dict[str, Any], broken: str | None) -> None:
    found = outcome.verdicts(result(**changed))
    assert [broken in name for name, holds in found.items() if not holds] == [True] * bool(broken)


def test_the_table_tells_what_was_done() -> None:
    given = result()
    text = outcome.table(given | {"verdicts": outcome.verdicts(given)})
    assert "60 minutes, 16 requests at once, 6 in all: 4 whose client left, 2 wrong bodies" in text
    assert "| too short |" in text and "memory of every process is flat: yes" in text


def test_errors_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("INFO fine\nRuntimeError: page 3 of the ledger is held twice\n", "utf-8")
    assert len(outcome.errors_of(log)) == 1
