"""The lab's examples as tokens, so that every peer reads the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.real.peers.judged import Question
from benchmarks.real.tasks import make_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from benchmarks.real.tasks import Example


def make_questions(
    tasks: Sequence[str], length_tokens: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """`count` examples of each task, task by task."""
    return [
        question_of(example, tokenizer)
        for task in tasks
        for example in make_examples(task, length_tokens, count, tokenizer)
    ]


def question_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> Question:
    """The tokens of an example; its question is the last line of the user's message.

    Raises:
        ValueError: the text and its question are other tokens apart than in one piece.
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = example.prompt(tokenizer)
    question = "\n" + example.content.rpartition("\n")[2]
    start = prompt.rindex(question)
    before, behind = tokens(prompt[:start]), tokens(prompt[start:])
    if before + behind != tokens(prompt):
        raise ValueError(f"the question of an example of {example.task!r} cannot be cut off")
    return Question(example.task, before + behind, len(before), tokens(example.told))
