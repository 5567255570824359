"""What stands in `examples/` runs as its first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.server import Server
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS
from vllm_budgetkv.batch.rows import Row, index
from vllm_budgetkv.testing.frames import render_frame, render_video

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command: object) -> str:
    """What a command writes; the vLLM of this environment is the one it finds."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures and a video of 48 frames."""
    import cv2

    folder = tmp_path_factory.mktemp("files")
    for number in (1, 2):
        render_frame(number).save(folder / f"{number}.png")
    kind = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(folder / "v.mp4"), kind, 8, (112, 112))
    for frame in render_video(48):
        writer.write(frame[:, :, ::-1])
    writer.release()
    return folder


@pytest.fixture(scope="module")
def url(vision_model: Path, files: Path) -> Iterator[str]:
    arguments = [*ARGUMENTS, "--skip-mm-profiling"]
    with Server(str(vision_model), arguments, files / "server.log", dict(os.environ)) as server:
        yield f"{server.url}/v1"


def test_the_sdk_asks_for_a_quota_and_reads_the_report(url: str, files: Path) -> None:
    example = [sys.executable, EXAMPLES / "ask_openai.py", files / "v.mp4", "Which letter?"]
    told = run(*example, "--url", url, "--page-quota", 10).splitlines()[-1]
    assert "held 10 blocks of 8 tokens" in told
    assert f"held {QUOTA_BLOCKS} blocks" in run(*example, "--url", url)


def test_curl_gets_the_report_too(url: str, files: Path) -> None:
    answer = json.loads(run(EXAMPLES / "ask_curl.sh", files / "v.mp4", "Which letter?", url))
    report = answer["kv_transfer_params"]["budgetkv"]
    assert report["peak_blocks"] == QUOTA_BLOCKS < report["full_cache_blocks"]


def test_offline_gives_each_request_its_quota(vision_model: Path, files: Path) -> None:
    told = run(sys.executable, EXAMPLES / "offline.py", vision_model, files / "1.png")
    held = [line for line in told.splitlines() if line.startswith("  held")]
    assert [line.rpartition(" of ")[2] for line in held] == ["64 blocks", "48 blocks"]


def test_rows_are_rows(tmp_path: Path, files: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    told = run(sys.executable, EXAMPLES / "make_rows.py", files, "Who wins?")
    rows.write_text(told, encoding="utf-8")
    found = list(index(rows))
    assert all(isinstance(row, Row) for row in found)
    assert [row.custom_id for row in found] == ["1.png", "2.png", "v.mp4"]
