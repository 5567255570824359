"""Prompts of text alone, as long as those with videos: what the suite shows, but written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import conversations
from benchmarks.quality.conversations import VIDEO, Conversation, Rng
from benchmarks.quality.suite import SMALL, SUITE, TEMPLATE_TOKENS, Example

if TYPE_CHECKING:
    from collections.abc import Callable

# of the lab's tokenizer
NOTE_TOKENS, PAGE_TOKENS = 5, 5

SENTENCES = (
    "The river rises in the hills and runs past two mills to the sea. ",
    "She counted the boats twice and wrote the number in a small book. ",
    "Nobody had told him that the train would leave from the other side. ",
    "In winter the road is closed, and bread comes over the ice. ",
    "A good map shows what is not there as clearly as what is. ",
    "They painted the door red, then grey, and in the end red again. ",
)


def notes(tokens: int, rng: Rng) -> Conversation:
    """The notes of task `note` without their videos."""
    num_notes = tokens // NOTE_TOKENS
    talk = conversations.notes_conversation(num_notes, 1, 0, SMALL, rng)
    note = talk.content.split("note:")[1 + int(rng.integers(num_notes))]
    return Conversation(talk.content.replace(VIDEO, ""), [], [(f"note:{note[0]}?", note[1])])


def pages(tokens: int, rng: Rng) -> Conversation:
    """The pages of task `page`, each pair written instead of drawn."""
    numbers = rng.integers(0, conversations.NUM_PAGES, tokens // PAGE_TOKENS).tolist()
    pairs = [conversations.random_pair(conversations.LETTERS, rng) for _ in numbers]
    content = "".join(f"page{n}:{pair}" for n, pair in zip(numbers, pairs, strict=True))
    place = int(rng.integers(len(numbers)))
    return Conversation(content, [], [(f"page{numbers[place]}?", pairs[place])])


def prose(tokens: int, rng: Rng) -> Conversation:
    """English sentences in random order, a token per character or a little more."""
    text = ""
    while len(text) < tokens:
        text += SENTENCES[rng.integers(len(SENTENCES))]
    return Conversation(text[:tokens], [], [("read", "")])


TEXT_TASKS: dict[str, Callable[[int, Rng], Conversation]] = {
    "notes in text": notes,
    "pages in text": pages,
    "prose": prose,
}


def make_text_examples(name: str, length_tokens: int, count: int) -> list[Example]:
    """`count` examples of a key of `TEXT_TASKS`, about `length_tokens` long; see `make_examples`.

    Not all have one right answer: a note may come back.
    """
    examples = []
    for index in range(count):
        rng = np.random.default_rng([SUITE, sum(map(ord, name)), length_tokens, index])
        talk = TEXT_TASKS[name](length_tokens - TEMPLATE_TOKENS, rng)
        examples.append(Example(name, length_tokens, None, talk))
    return examples
