"""Workers whose servers refuse or die, on a local Ray; the servers are doubles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batch.server_double import write_server

pytest.importorskip("ray", reason="pip install 'vllm-budgetkv[ray]'")

ROOT = Path(__file__).parents[2]


def run(folder: Path, texts: list[str], *arguments: str) -> tuple[int, str]:
    """Answer one row for each text, which is its name too; the exit status and what was told."""
    rows = [{"custom_id": text, "messages": [{"role": "user", "content": text}]} for text in texts]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    if not (folder / "double").exists():
        write_server(folder / "double")
    command = [sys.executable, "-m", "vllm_budgetkv.ray"]
    done = subprocess.run(
        [*command, str(folder / "in.jsonl"), str(folder / "out"), "--batch-rows", "1", *arguments],
        env=os.environ | {"PYTHONPATH": f"{folder / 'double'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stderr


def answers(folder: Path) -> dict[str, str]:
    """By name, the text that was answered; a name that stands there twice fails."""
    parts = sorted((folder / "out").glob("answers-*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]
    found = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def test_a_row_that_ends_its_server_ends_the_batch_and_no_answer(tmp_path: Path) -> None:
    """Ray would ask it again for ever. Without that row the same folder is gone on with."""
    texts = [f"text {number}" for number in range(12)]
    status, told = run(tmp_path, [*texts[:6], "die", *texts[6:]], "--model", "m")
    assert status == 1, told[-3000:]
    assert "run it again to go on" in told
    before = answers(tmp_path)
    assert "die" not in before and all(name == text for name, text in before.items())
    status, told = run(tmp_path, texts, "--model", "m", "--workers", "2")
    assert status == 0, told[-3000:]
    assert answers(tmp_path) == {text: text for text in texts}


def test_a_server_that_refuses_is_quoted(tmp_path: Path) -> None:
    status, told = run(tmp_path, ["text"], "--model", "refused")
    assert status == 1
    last = told[told.rindex("budgetkv: ") :]
    assert last.startswith("budgetkv: vllm serve ended; its log:")
    assert "ValueError: a quota of 2 blocks is too small" in last
