"""A file of conversations on a local Ray: two workers, one of which is killed midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run
from tests.e2e.job import content_of
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS
from vllm_budgetkv.batch.folder import Folder
from vllm_budgetkv.batch.rows import index

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("ray", reason="pip install 'vllm-budgetkv[ray]'")
pytestmark = pytest.mark.engine

MAX_TOKENS = 24
ENGINE = {
    "block_size": 8,
    "max_model_len": 16384,
    "num_gpu_blocks_override": 60,
    "max_num_seqs": 8,
    "skip_mm_profiling": True,
}
BUDGET = {
    "policy": "hybrid",
    "page_quota": QUOTA_BLOCKS,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
    "window_tokens": 8,
}
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    f"row {number}": [
        {"video": 48, "seed": number} if number % 4 == 0 else {"image": number},
        {"text": f"Which letter is on sign {number}?"},
    ]
    for number in range(16)
}
DONE = "row 3"
BAD = {
    "too small": {"content": [{"type": "text", "text": "?"}], "vllm_xargs": {"kv_page_quota": 1}},
    "too long": {"content": [{"type": "text", "text": "word " * 40_000}]},
    "no image": {
        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    },
}
WAIT_SECONDS = 420.0


def row(name: str, content: list[dict[str, Any]], **other: Any) -> str:
    asked = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **other}
    messages = [{"role": "user", "content": content}]
    return json.dumps({"custom_id": name, "messages": messages, **asked})


def texts_of_rows() -> list[str]:
    good = [row(name, [content_of(part) for part in parts]) for name, parts in QUESTIONS.items()]
    bad = [row(name, **asked) for name, asked in BAD.items()]
    return [*good[:5], "{not JSON", *bad, *good[5:]]


def seed(out: Path, rows: Path, arguments: list[str]) -> None:
    """What an earlier run left: an answer, an error, and half a part."""
    folder = Folder(out, arguments, accept_others=False)
    (found,) = [one for one in index(rows) if one.custom_id == DONE]
    body = {"choices": [], "kv_transfer_params": None}
    answer = {"id": f"budgetkv-{found.key}", "custom_id": DONE, "response": {"body": body}}
    folder.write([{**answer, "error": None}, {**answer, "custom_id": "row 4", "error": "no"}])
    (out / "answers-000002.jsonl.draft").write_text('{"custom_id"', encoding="utf-8")
    folder.close()


def written(out: Path, kind: str) -> list[dict[str, Any]]:
    parts = sorted(out.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]


def kill_a_worker(driver: subprocess.Popen[str], out: Path) -> str:
    """Kill the first worker that has answered, while rows are left; its name."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := [one for one in written(out, "answers") if "worker" in one]):
        assert driver.poll() is None and time.monotonic() < deadline, "no row was answered"
        time.sleep(0.05)
    os.kill(int(found[0]["worker"].rpartition(":")[2]), signal.SIGKILL)
    assert len(written(out, "answers")) < len(QUESTIONS), "nothing was left to lose"
    return found[0]["worker"]


def processes_of(marker: str) -> list[int]:
    """Processes that inherited `marker` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("ray")
    rows, out, marker = folder / "in.jsonl", folder / "out", uuid.uuid4().hex
    rows.write_text("\n".join(texts_of_rows()), encoding="utf-8")
    arguments = ["--model", str(vision_model), *ARGUMENTS, "--skip-mm-profiling"]
    # an engine of two processes instead of three starts in two thirds of the time
    arguments += ["--distributed-executor-backend", "uni"]
    seed(out, rows, arguments)
    command = [sys.executable, "-m", "vllm_budgetkv.ray", str(rows), str(out)]
    # both engines run on the same two cores
    variables = {
        "BUDGETKV_TEST": marker,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(
            [*command, "--workers", "2", "--batch-rows", "2", *arguments],
            env=os.environ | variables | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            killed = kill_a_worker(driver, out)
            status = driver.wait(WAIT_SECONDS)
        finally:
            driver.send_signal(signal.SIGINT)
            driver.wait(60)
    told = (folder / "log").read_text(encoding="utf-8", errors="replace")
    yield {"out": out, "killed": killed, "status": status, "told": told, "marker": marker}


def test_every_row_is_answered_once(batch: dict[str, Any]) -> None:
    assert batch["status"] == 0, batch["told"][-3000:]
    answers = written(batch["out"], "answers")
    assert Counter(one["custom_id"] for one in answers) == Counter(list(QUESTIONS))
    workers = {one["worker"] for one in answers if one["custom_id"] != DONE}
    assert batch["killed"] in workers and len(workers) > 1
    reports = [
        one["response"]["body"]["kv_transfer_params"]["budgetkv"]
        for one in answers
        if one["custom_id"] != DONE
    ]
    assert max(report["peak_blocks"] for report in reports) == QUOTA_BLOCKS
    assert any(report.get("prompt_compressions") for report in reports)


def test_what_an_earlier_run_answered_stays(batch: dict[str, Any]) -> None:
    (found,) = [one for one in written(batch["out"], "answers") if one["custom_id"] == DONE]
    assert found["response"]["body"]["choices"] == []
    assert not list(batch["out"].glob("*.draft"))
    assert (
        f"{len(QUESTIONS)} of 20 rows answered, 4 with an error, 1 by an earlier run"
        in (batch["told"])
    )


def test_bad_rows_are_told_and_end_nothing(batch: dict[str, Any]) -> None:
    errors = {one["custom_id"]: one["error"]["message"] for one in written(batch["out"], "errors")}
    assert set(errors) == {None, *BAD}
    assert "kv_page_quota must be from" in errors["too small"]
    assert "maximum context length" in errors["too long"]
    assert "image" in errors["no image"]


def test_no_server_is_left(batch: dict[str, Any]) -> None:
    """The killed worker's neither: it would keep its GPU."""
    deadline = time.monotonic() + 60
    while left := processes_of(batch["marker"]):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_answers_are_those_of_an_engine_alone(
    batch: dict[str, Any], tmp_path: Path, vision_model: Path
) -> None:
    requests = [
        {"name": name, "content": parts, "max_tokens": MAX_TOKENS}
        for name, parts in QUESTIONS.items()
    ]
    alone = run(tmp_path, vision_model, requests, budget=BUDGET, **ENGINE)["answers"]
    for one in written(batch["out"], "answers"):
        if one["custom_id"] != DONE:
            text = one["response"]["body"]["choices"][0]["message"]["content"]
            assert text == alone[one["custom_id"]]["text"], one["custom_id"]
