"""The tasks of the lab: the answer is what an independent reading of the scenes gives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.quality import curriculum, reader
from benchmarks.quality.conversations import VIDEO
from benchmarks.quality.scenes import LETTERS, NUM_DIGITS, NUM_SIGNS, NUM_VARIANTS
from benchmarks.quality.suite import DEPTHS, SUITE, TASKS, TEMPLATE_TOKENS, make_examples

if TYPE_CHECKING:
    from benchmarks.quality.suite import Example


def pairs_of(scene: np.ndarray) -> list[str]:
    """What each frame shows, read from its cells; "" for nothing."""
    shown = []
    for frame in scene:
        signs = {int(cell) % NUM_SIGNS for cell in frame.flat if cell < NUM_VARIANTS * NUM_SIGNS}
        assert len(signs) <= 1, "a frame shows two signs"
        letter, digit = divmod(signs.pop(), NUM_DIGITS) if signs else (None, 0)
        shown.append("" if letter is None else f"{LETTERS[letter]}{digit}")
    return shown


def read(example: Example) -> str:
    """The answer, from content, scenes and question alone."""
    talk = example.talk
    text = talk.content + talk.turns[-1][0]
    pieces = text.split(VIDEO)
    scenes = [pairs_of(scene) for scene in talk.scenes]
    assert len(pieces) == len(scenes) + 1
    question = pieces[0] if example.task == "ahead" else pieces[-1].rpartition(";")[2]
    frames = [pair for scene in scenes for pair in scene]
    if found := re.fullmatch(r"page(\d)\?", question):
        (index,) = (i for i, piece in enumerate(pieces[:-1]) if piece == f"page{found[1]}:")
        (pair,) = (shown for shown in scenes[index] if shown)
        return pair
    if found := re.fullmatch(r"note:([A-Z])\?", question):
        (digit,) = re.findall(rf"note:{found[1]}(\d);", text)
        return digit
    if found := re.fullmatch(r"([A-Z])([A-Z]) first\?", question):
        firsts = [pair[:1] for pair in frames if pair[:1] in found.groups()]
        assert set(firsts) == set(found.groups())
        return firsts[0]
    letter, kind = re.fullmatch(r"([A-Z])(?: (\w+))?\?", question).groups()
    places = [index for index, pair in enumerate(frames) if pair[:1] == letter]
    digits = [frames[place][1] for place in places]
    if kind is None:
        (digit,) = digits
        return digit
    return {
        "first": lambda: digits[0],
        "last": lambda: digits[-1],
        "change": lambda: digits[0] + digits[-1],
        "count": lambda: str(len(digits)),
        "next": lambda: frames[places[0] + 1],
    }[kind]()


@pytest.mark.parametrize("length_tokens", [1024, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str, length_tokens: int) -> None:
    for example in make_examples(task, length_tokens, 20):
        assert read(example) == example.answer


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_the_same_each_time(task: str) -> None:
    for one, other in zip(make_examples(task, 1024, 6), make_examples(task, 1024, 3), strict=False):
        assert (one.talk.content, one.talk.turns) == (other.talk.content, other.talk.turns)
        for scene, again in zip(one.talk.scenes, other.talk.scenes, strict=True):
            np.testing.assert_array_equal(scene, again)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_about_as_long_as_asked(task: str) -> None:
    tokenizer = reader.build_vocabulary()
    for length_tokens in (1024, 4096):
        for example in make_examples(task, length_tokens, 5):
            talk = example.talk
            text = talk.content + "".join(question for question, _ in talk.turns)
            text_tokens = len(tokenizer(text)["input_ids"]) - len(talk.scenes)
            tokens = TEMPLATE_TOKENS + text_tokens + sum(scene.size for scene in talk.scenes)
            assert 0.85 * length_tokens < tokens < 1.1 * length_tokens, tokens


def test_depth_moves_the_evidence() -> None:
    for example, depth in zip(make_examples("needle", 1024, 5), DEPTHS, strict=True):
        letter = example.talk.turns[-1][0][0]
        frames = [pair[:1] for pair in pairs_of(example.talk.scenes[0])]
        assert frames.index(letter) == round(depth * (len(frames) - 1))


def test_seeds_are_apart_from_those_of_training() -> None:
    """No training step draws what the suite draws: their generators are seeded by other lists."""
    drawn = {
        np.random.default_rng([SUITE, sum(map(ord, t)), 2048, 0]).integers(2**60) for t in TASKS
    }
    trained = {int(curriculum.rng_of(seed, SUITE).integers(2**60)) for seed in range(3)}
    trained |= {int(curriculum.rng_of(SUITE, step).integers(2**60)) for step in range(3)}
    assert len(drawn) == len(TASKS), "two tasks share their seeds"
    assert not drawn & trained
