"""`vllm run-batch` under a quota: a file of conversations in, answers with their reports out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.job import content_of
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS, VIDEO

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

TIGHT_BLOCKS = QUOTA_BLOCKS - 2


def row(name: str, parts: list[dict[str, Any]], **asked: Any) -> str:
    """A line of OpenAI's batch format."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [content_of(part) for part in parts]}],
        "max_tokens": 6,
        "temperature": 0.0,
    }
    if asked:
        body["vllm_xargs"] = asked
    request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request) + "\n"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> dict[str, Any]:
    """What was written, by the name of the row."""
    folder = tmp_path_factory.mktemp("batch")
    asked, told = folder / "asked.jsonl", folder / "told.jsonl"
    asked.write_text(
        row("video", VIDEO)
        + row("tight", VIDEO, kv_page_quota=TIGHT_BLOCKS)
        + row("bad", VIDEO, kv_page_quota=1)
        + row("text", [{"text": "Which letter?"}]),
        encoding="utf-8",
    )
    files = ["-i", str(asked), "-o", str(told)]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", *files]
    served = ["--model", str(vision_model), "--served-model-name", "m"]
    done = subprocess.run(
        [*command, *served, *ARGUMENTS],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, told.read_text(encoding="utf-8").splitlines())
    return {line["custom_id"]: line for line in lines}


@pytest.mark.parametrize(
    ("name", "quota_blocks"), [("video", QUOTA_BLOCKS), ("tight", TIGHT_BLOCKS)]
)
def test_an_answer_says_what_its_request_held(
    answers: dict[str, Any], name: str, quota_blocks: int
) -> None:
    response = answers[name]["response"]
    assert response["status_code"] == 200
    assert response["body"]["choices"][0]["message"]["content"]
    report = response["body"]["kv_transfer_params"]["budgetkv"]
    assert report["quota_blocks"] == report["peak_blocks"] == quota_blocks
    assert report["full_cache_blocks"] > 8 * quota_blocks
    assert report["prompt_compressions"] > 0


def test_a_bad_row_is_told_and_ends_nothing(answers: dict[str, Any]) -> None:
    assert list(answers) == ["video", "tight", "bad", "text"]
    assert answers["bad"]["response"]["status_code"] == 400
    assert "kv_page_quota" in json.dumps(answers["bad"])
    assert answers["text"]["response"]["status_code"] == 200
