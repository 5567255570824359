"""`inspect`: wrong input is refused in the user's words, and a page is what the request was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from tests.inspection.test_page import Reader, numbers_in
from vllm_budgetkv.cli.main import main
from vllm_budgetkv.inspection.story import read_story
from vllm_budgetkv.testing.frames import render_frame, render_video

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
QUOTA_BLOCKS, BLOCK_TOKENS, NUM_FRAMES = 9, 16, 64
ENGINE = [
    *("--kv-page-quota", str(QUOTA_BLOCKS), "--kv-chunk-tokens", "64", "--kv-probe-tokens", "8"),
    *("--kv-sink-tokens", "4", "--kv-window-tokens", "16", "--kv-check-ledger"),
    *("--max-model-len", "2048", "--dtype", "float32"),
    *("--media-io-kwargs", '{"video": {"video_backend": "opencv", "num_frames": -1}}'),
]


@pytest.fixture
def refuse(
    environment: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., str]:
    """What `inspect` says when it is given these arguments, which it refuses."""
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        # what the command sets itself is put back
        monkeypatch.setenv(name, os.environ.get(name, "1" if "SPACE" in name else "ERROR"))
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")

    def run(*arguments: str) -> str:
        status = main(["inspect", "--out", str(tmp_path / "page.html"), *arguments])
        found = capsys.readouterr()
        assert status == 2 and not found.out
        assert not (tmp_path / "page.html").exists()
        return found.err

    return run


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give --question TEXT, with --image and --video; or --messages FILE"),
        (["--question", "a", "--messages", "b"], "give --question TEXT"),
        (["--image", "no.png", "--question", "a"], "--image no.png cannot be read (No such file"),
        (["--video", ".", "--question", "a"], "--video . cannot be read (Is a directory"),
        (["--messages", "no.json"], "--messages no.json cannot be read"),
        (["--messages", "README.md"], "--messages README.md is no JSON"),
        (["--question", "a", "--max-tokens", "0"], "--max-tokens must be from 1 to 4096; got 0"),
        (["--question", "a", "--out", "no/page.html"], "--out no/page.html cannot be written"),
        (["--question", "a", "--request", "7"], "--request is a request of --trace"),
        (["--messages", "b", "--image", "c"], "--messages holds its images and videos: remove"),
    ],
)
def test_what_cannot_be_shown_is_refused_at_once(
    arguments: list[str],
    told: str,
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert f"vllm-budgetkv inspect: {told}" in refuse("--model", "m", *arguments)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("[]", "must be a list of chat messages"),
        ("{}", "must be a list of chat messages"),
        ('[{"content": "a"}]', 'as [{"role": "user", "content": "Hello"}]'),
    ],
)
def test_messages_that_are_none(
    given: str, told: str, refuse: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(given, encoding="utf-8")
    assert told in refuse("--model", "m", "--messages", str(file))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kv-page-quota", "2"], "a quota of 2 blocks of 16 tokens is too small for chunks of"),
        ([], "--kv-policy hybrid needs exactly one of --kv-page-quota"),
        (["--kv-page-quota", "64", "--kv-trace-file", "no/t.jsonl"], "--kv-trace-file no/t.jsonl"),
    ],
)
def test_options_are_refused_as_the_server_does(
    options: list[str], told: str, refuse: Callable[..., str], llama: Path
) -> None:
    said = refuse("--model", str(llama), "--question", "Hello", *options)
    assert told in said and len(said.splitlines()) <= 2, said


def test_an_option_that_there_is_not_ends_with_the_help(
    refuse: Callable[..., str], llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        refuse("--model", str(llama), "--question", "Hello", "--kv-policy", "hybrit")
    assert stop.value.code == 2
    assert "see vllm-budgetkv inspect --help" in capsys.readouterr().err


def test_a_text_model_takes_no_picture(
    refuse: Callable[..., str], llama: Path, tmp_path: Path
) -> None:
    render_frame(0).save(tmp_path / "a.png")
    said = refuse("--model", str(llama), "--image", str(tmp_path / "a.png"), "--question", "a")
    assert "vllm-budgetkv inspect: " in said and "Traceback" not in said


@pytest.mark.parametrize("content", ["", "{}\n"], ids=["empty", "no-trace"])
def test_a_trace_that_is_none(
    content: str, refuse: Callable[..., str], llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(content, encoding="utf-8")
    said = refuse("--model", str(llama), "--trace", str(file))
    assert ("no line of any request" if not content else "no trace of --kv-trace-file") in said


def run_command(*arguments: str) -> list[Path]:
    """`vllm-budgetkv inspect` in a process of its own; the files that it wrote."""
    process = subprocess.run(
        [sys.executable, "-m", "vllm_budgetkv.cli.main", "inspect", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return [Path(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image and a video of 64 frames."""
    found = tmp_path_factory.mktemp("inspect")
    render_frame(3, size_pixels=(168, 112)).save(found / "a.png")
    kind = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(found / "v.mp4"), kind, 8, (112, 112))
    for frame in render_video(NUM_FRAMES):
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return found


@pytest.fixture(scope="module")
def media(folder: Path) -> list[str]:
    return ["--image", str(folder / "a.png"), "--video", str(folder / "v.mp4")]


@pytest.fixture(scope="module")
def page(folder: Path, media: list[str], qwen2_5_vl: Path) -> str:
    """Of a real engine, which writes its report and trace to files of ours too."""
    question = "Which letter does the video show? </script><b>Bold</b> & so on"
    files = run_command(
        *("--model", str(qwen2_5_vl), *media, "--question", question, *ENGINE),
        *("--kv-report-file", str(folder / "report.jsonl")),
        *("--kv-trace-file", str(folder / "trace.jsonl")),
        *("--out", str(folder / "page.html"), "--png", str(folder / "png"), "--max-tokens", "20"),
    )
    names = ["page.html", "kept.png", "text.png", "heads.png", "blocks.png"]
    assert [file.name for file in files] == names and all(file.is_file() for file in files)
    return files[0].read_text(encoding="utf-8")


def record_of(folder: Path) -> dict[str, Any]:
    (line,) = (folder / "report.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line)


@pytest.mark.engine
def test_the_page_of_a_real_request_says_what_its_record_says(page: str, folder: Path) -> None:
    record, numbers = record_of(folder), numbers_in(page)
    shared = set(record) & set(numbers) - {"heads"}
    assert {"peak_blocks", "full_cache_blocks", "prompt_tokens", "compressions"} <= shared
    assert {name: numbers[name] for name in shared} == {name: record[name] for name in shared}
    assert numbers["peak_blocks"] == numbers["quota_blocks"] == QUOTA_BLOCKS
    assert numbers["heads"] == {name: n for name, n in record["heads"].items() if n}
    for name, kept in numbers["kept_tokens_per_head"].items():
        for kind, tokens in kept.items():
            assert tokens == round(record["kept"][name][kind] / record["heads"][name], 1)
    # two frames become one of 16 patches; the image has 24
    assert numbers["vision_tokens"] == NUM_FRAMES // 2 * 16 + 24
    text = Reader(page).text
    assert f"What stayed of a prompt of {record['prompt_tokens']:,} tokens" in text
    assert "</script><b>Bold</b> & so on" in "".join(text.split("↵ ")), "the question is readable"


@pytest.mark.engine
@pytest.mark.usefixtures("page")
def test_the_trace_of_a_real_request_is_inside_the_ledger(folder: Path) -> None:
    """The engine checks the ledger after every step; the trace says what it found there."""
    story = read_story(folder / "trace.jsonl")
    assert story is not None and story.kept is not None
    record = record_of(folder)
    assert story.record == record
    assert story.steps[:, 2].max() == record["peak_blocks"] == QUOTA_BLOCKS
    assert (story.steps[:, 3] <= story.steps[:, 2] * story.num_all_heads).all()
    assert story.class_history.shape[0] == record["compressions"] > 5
    assert story.is_static.tolist() == record["static_heads"]
    assert np.array_equal(story.kept.sum(-1), story.held_tokens)
    for one in story.classes:
        counts = np.asarray(record["kept_counts"][one.name])
        chosen = story.is_static == (one.name == "static")
        assert np.array_equal(story.kept[chosen].sum(0), counts)
    assert story.steps[-2, 1] == record["prompt_tokens"] + record["output_tokens"] - 1


@pytest.mark.engine
@pytest.mark.usefixtures("page")
def test_a_trace_is_shown_without_an_engine(
    folder: Path, media: list[str], qwen2_5_vl: Path, tmp_path: Path
) -> None:
    (file,) = run_command(
        *("--model", str(qwen2_5_vl), "--trace", str(folder / "trace.jsonl"), *media),
        *("--media-io-kwargs", ENGINE[-1], "--out", str(tmp_path / "again.html")),
    )
    again, first = file.read_text(), (folder / "page.html").read_text()
    assert numbers_in(again) == numbers_in(first)
    pictures = [found["src"] for found in Reader(first).all("img")]
    assert [found["src"] for found in Reader(again).all("img")] == pictures
    assert "Answer" in Reader(first).text and "Answer" not in Reader(again).text
