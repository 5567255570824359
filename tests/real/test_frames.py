"""Frames and their tasks: what is drawn, how long prompts are, and where the answer is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.real.cells import (
    CELL_PIXELS,
    CELLS,
    FRAME_PIXELS,
    Vocabulary,
    cells_of,
    corner,
    draw_frames,
    label_of,
    vocabulary,
)
from benchmarks.real.eyes import FRAME_TOKENS, IMAGE
from benchmarks.real.frames import FRAME_TASKS, FrameExample, blank_of, make_frame_examples
from benchmarks.real.tasks import DEPTHS

LENGTH = 512
WORDS = Vocabulary(ids=(5, 7, 9), labels=("", "kettle", "\N{MIDDLE DOT}ites"), keys=("kettle",))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" kettle", "kettle"),
        ("ites", "\N{MIDDLE DOT}ites"),
        (" ", "\N{OPEN BOX}"),
        ("7", "7"),
        (" 7", "\N{OPEN BOX}7"),
        (",", ","),
        ("'s", "'s"),
        (" understanding", None),
        ("é", None),
        ("", None),
        ("O", None),
    ],
)
def test_labels(text: str, label: str | None) -> None:
    assert label_of(text) == label


def test_a_cell_shows_its_word_in_bright_letters() -> None:
    rows = np.zeros((2, CELLS), int)
    rows[1, 6] = 1
    frames = draw_frames(rows, WORDS, np.random.default_rng(3))
    blank = draw_frames(rows * 0, WORDS, np.random.default_rng(3))
    assert frames.shape == (2, FRAME_PIXELS, FRAME_PIXELS, 3) and frames.dtype == np.uint8
    top, left = corner(6)
    cell = (1, slice(top, top + CELL_PIXELS), slice(left, left + CELL_PIXELS))
    inked = WORDS.masks[1] > 0.9
    assert inked.sum() > 20 and frames[cell][inked].min() > frames[0].max()
    frames[cell] = blank[cell]
    np.testing.assert_array_equal(frames, blank)


def test_what_cannot_be_drawn_is_refused() -> None:
    assert cells_of([7, 9], WORDS, 5).tolist() == [[1, 2] + [0] * (CELLS - 2)]
    with pytest.raises(KeyError):
        cells_of([8], WORDS, 5)


def shown(example: FrameExample, tokenizer: Any) -> str:
    """The text of all frames."""
    ids = vocabulary(tokenizer).ids
    return tokenizer.decode([ids[row] for frame in example.cells for row in frame])


def test_every_word_looks_another_way(tokenizer: Any) -> None:
    words = vocabulary(tokenizer)
    assert len(set(words.labels)) == len(words.ids) == len(np.unique(words.masks, axis=0))
    assert words.labels[words.index[blank_of(tokenizer)]] == ""


@pytest.mark.parametrize("name", FRAME_TASKS)
def test_frames_hold_the_answer_and_the_question_does_not(name: str, tokenizer: Any) -> None:
    for example in make_frame_examples(name, LENGTH, 3, tokenizer):
        text = shown(example, tokenizer)
        assert text.count(f" {example.answers[0]}") == 1
        assert example.answers[0] not in example.prompt(tokenizer)
        asks_first = example.content.find("What is") < example.content.find(IMAGE)
        assert asks_first == FRAME_TASKS[name].asks_first


@pytest.mark.parametrize("name", FRAME_TASKS)
def test_prompts_have_the_length_that_was_asked_for(name: str, tokenizer: Any) -> None:
    for example in make_frame_examples(name, LENGTH, 2, tokenizer):
        assert example.content.count(IMAGE) == len(example.cells)
        text = tokenizer(example.prompt(tokenizer).replace(IMAGE, ""))["input_ids"]
        tokens = len(text) + FRAME_TOKENS * len(example.cells)
        assert 0.85 * LENGTH < tokens <= LENGTH


@pytest.mark.parametrize("name", FRAME_TASKS)
def test_the_answer_is_shown_at_its_depth(name: str, tokenizer: Any) -> None:
    for example, depth in zip(make_frame_examples(name, 2048, 5, tokenizer), DEPTHS, strict=True):
        text = shown(example, tokenizer)
        place = text.find(f" {example.answers[0]}") / len(text)
        assert example.depth == depth and abs(place - depth) < 0.1


def test_inputs_have_a_picture_for_each_place_and_are_the_same_each_time(tokenizer: Any) -> None:
    (one,), (again,) = (make_frame_examples("sign", LENGTH, 1, tokenizer) for _ in range(2))
    assert one == again
    inputs, others = one.inputs(tokenizer, behind=one.told), again.inputs(tokenizer)
    pictures = inputs["multi_modal_data"]["image"]
    assert len(pictures) == inputs["prompt"].count(IMAGE)
    assert inputs["prompt"] == others["prompt"] + one.told
    np.testing.assert_array_equal(pictures, others["multi_modal_data"]["image"])
