"""The tasks for lmms-eval ask what the lab asks, on the same pixels; lmms-eval is not needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.conversations import VIDEO
from benchmarks.quality.lab import MAX_ANSWER_TOKENS
from benchmarks.quality.lmms_eval import examples, write_data
from benchmarks.quality.scenes import Palette
from benchmarks.quality.suite import make_examples

if TYPE_CHECKING:
    from pathlib import Path

TASKS = ("needle", "page", "ahead", "second", "detail")
LENGTH_TOKENS, COUNT = 256, 2


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    write_data.write_tasks(TASKS, LENGTH_TOKENS, COUNT, folder)
    return folder


def documents(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_messages_are_the_conversation(out: Path, task: str) -> None:
    docs = documents(out, task)
    wanted = make_examples(task, LENGTH_TOKENS, COUNT)
    assert len(docs) == COUNT
    for doc, example in zip(docs, wanted, strict=True):
        messages = examples.doc_to_messages(doc)
        said = ["".join(part.get("text", VIDEO) for part in m["content"]) for m in messages]
        turns = [text for turn in example.talk.turns for text in turn]
        assert said == [example.talk.content + turns[0], *turns[1:-1]]
        assert [m["role"] for m in messages] == ["user", "assistant", "user"][: len(messages)]
        assert doc["answer"] == example.answer


@pytest.mark.parametrize("task", TASKS)
def test_frames_are_the_pixels_of_the_lab(out: Path, palette: Palette, task: str) -> None:
    for doc, example in zip(
        documents(out, task), make_examples(task, LENGTH_TOKENS, COUNT), strict=True
    ):
        parts = [p for m in examples.doc_to_messages(doc) for p in m["content"]]
        videos = [part["url"] for part in parts if part["type"] == "video"]
        for frames, scene in zip(videos, example.talk.scenes, strict=True):
            np.testing.assert_array_equal(np.stack(frames), palette.draw(scene))


def test_equal_frames_behind_each_other_stay_apart(tmp_path: Path, palette: Palette) -> None:
    scene = np.zeros((3, 2, 2), dtype=np.int64)
    write_data.film_strip(scene, palette).save(tmp_path / "strip.png")
    frames = examples.frames_of(str(tmp_path / "strip.png"), 3)
    assert len(frames) == 6
    assert all(frame.size == (56, 56) for frame in frames)


def test_rows_have_one_type(out: Path) -> None:
    """A table has one type per column, so no part may leave a key out."""
    for task in TASKS:
        for doc in documents(out, task):
            keys = {tuple(part) for m in doc["messages"] for part in m["content"]}
            assert keys == {("text", "strip", "frames")}


def test_a_task_names_its_data_and_the_group_its_tasks(out: Path) -> None:
    task = json.loads((out / "needle.yaml").read_text())
    assert task["task"] == "budgetkv_needle"
    assert task["dataset_kwargs"]["data_files"] == {"test": str(out / "needle.jsonl")}
    assert task["generation_kwargs"] == {"max_new_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
    assert task["include"] == str(write_data.TEMPLATE)
    group = json.loads((out / "budgetkv.yaml").read_text())
    assert group["task"] == [f"budgetkv_{name}" for name in TASKS]


def test_the_template_names_functions_that_exist() -> None:
    text = write_data.TEMPLATE.read_text()
    named = [line.split("!function examples.")[1] for line in text.splitlines() if "!func" in line]
    assert named == ["doc_to_messages", "doc_to_text", "process_results"]
    assert all(callable(getattr(examples, name)) for name in named)


@pytest.mark.parametrize(("text", "right"), [("7", 1.0), (" 7.\n", 1.0), ("77", 0.0), ("", 0.0)])
def test_an_answer_is_right_to_the_letter(text: str, right: float) -> None:
    assert examples.process_results({"answer": "7"}, [text]) == {"right": right}


def test_the_question_of_a_document(out: Path) -> None:
    for doc, example in zip(
        documents(out, "second"), make_examples("second", LENGTH_TOKENS, COUNT), strict=True
    ):
        assert examples.doc_to_text(doc) == example.talk.turns[-1][0]


def test_videos_are_lossless(out: Path) -> None:
    strip = documents(out, "needle")[0]["messages"][0]["content"][0]["strip"]
    with Image.open(strip) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
