"""The text tasks: lengths, depths, and that nothing but the text holds the answer."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.real import prose
from benchmarks.real.tasks import DEPTHS, TASKS, holds_all, make_examples

LENGTH = 1024
# a continuation asks nothing
QUESTIONS = [name for name in TASKS if name != "continuation"]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_the_length_that_was_asked_for(name: str, tokenizer: Any) -> None:
    for example in make_examples(name, LENGTH, 2, tokenizer):
        tokens = len(tokenizer(example.prompt(tokenizer))["input_ids"])
        assert 0.85 * LENGTH < tokens <= LENGTH


@pytest.mark.parametrize("name", QUESTIONS)
def test_text_holds_the_answers_and_the_question_does_not(name: str, tokenizer: Any) -> None:
    for example in make_examples(name, LENGTH, 3, tokenizer):
        assert holds_all(example.content, example.answers)
        assert holds_all(example.told, example.answers)
        question = example.content.rsplit("\n", 1)[-1] + example.prefix
        assert not any(answer in question for answer in example.answers)


def test_examples_are_the_same_each_time_and_differ(tokenizer: Any) -> None:
    one, again = (make_examples("multikey", LENGTH, 2, tokenizer) for _ in range(2))
    assert one == again and one[0].answers != one[1].answers


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])
def test_evidence_stands_at_its_depth(name: str, tokenizer: Any) -> None:
    for example, depth in zip(make_examples(name, LENGTH, 5, tokenizer), DEPTHS, strict=True):
        found = re.search(rf"(is|is:|sells) {example.answers[0]}\b", example.content)
        assert found is not None
        place = found.start() / len(example.content)
        assert example.depth == depth and abs(place - (0.07 + 0.86 * depth)) < 0.12


def test_common_words_come_ten_times_as_often(tokenizer: Any) -> None:
    (example,) = make_examples("common", 2048, 1, tokenizer)
    counts = [example.content.count(f" {word} ") for word in example.answers]
    assert min(counts) >= 10


def test_a_continuation_is_what_follows_in_the_book(tokenizer: Any) -> None:
    for example in make_examples("continuation", LENGTH, 3, tokenizer):
        *earlier, last = example.content.split("\n")[1:]
        blocks = prose.paragraphs()
        place = blocks.index(last)
        assert list(blocks[place - len(earlier) : place]) == earlier
        assert blocks[place + 1].startswith(example.prefix + example.told)
