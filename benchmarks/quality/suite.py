"""The tasks of the lab: procedural, seeded, each example with the one right answer.

Seeds of reports are apart from those of the training: a training batch draws from
`[seed, step]`, an example from `[SUITE, task, length, index]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import conversations
from benchmarks.quality.conversations import VIDEO, Conversation, Grid, Rng, draw_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SUITE = 20261121
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PERIOD = 5
TEMPLATE_TOKENS = 32


@dataclass(frozen=True)
class Example:
    """One request and its answer.

    Attributes:
        task: name of the task.
        length_tokens: about how long the prompt is.
        depth: where the evidence is, 0 (first frame) to 1 (last); None where it has no one place.
        talk: content, scenes and turns; the last turn is asked, the others are history.
    """

    task: str
    length_tokens: int
    depth: float | None
    talk: Conversation

    @property
    def answer(self) -> str:
        return self.talk.turns[-1][1]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        title: for plots and tables.
        what: one sentence on what is asked.
        make: (vision tokens, depth, rng) to a conversation.
        has_depth: whether `depth` moves the evidence.
    """

    title: str
    what: str
    make: Callable[[int, float, Rng], Conversation]
    has_depth: bool = True


SMALL, SQUARE = Grid(2, 2), Grid(4, 4)


def make_examples(name: str, length_tokens: int, count: int) -> list[Example]:
    """`count` examples of a task, all depths equally often.

    Args:
        name: a key of `TASKS`.
        length_tokens: about how long the prompts are.
        count: how many.
    """
    task = TASKS[name]
    examples = []
    for index in range(count):
        depth = DEPTHS[index % len(DEPTHS)]
        rng = np.random.default_rng([SUITE, sum(map(ord, name)), length_tokens, index])
        talk = task.make(length_tokens - TEMPLATE_TOKENS, depth, rng)
        examples.append(Example(name, length_tokens, depth if task.has_depth else None, talk))
    return examples


def place_of(depth: float, num_frames: int) -> int:
    return round(depth * (num_frames - 1))


def background(num_frames: int, letters: Sequence[str], rng: Rng, blank: float = 0.3) -> list[str]:
    """Pairs of every frame before the evidence is put in; "" shows nothing."""
    empty = rng.random(num_frames) < blank
    return ["" if hide else conversations.random_pair(letters, rng) for hide in empty]


def pair_of(letter: str, rng: Rng) -> str:
    return f"{letter}{rng.integers(10)}"


def needle(
    tokens: int, depth: float, rng: Rng, grid: Grid = SMALL, *, fills_frame: bool = False
) -> Conversation:
    """One pair shown once among others, in one cell or in all cells of its frame."""
    letters = conversations.shuffled_letters(rng)
    pairs = background(tokens // grid.tokens, letters[1:], rng)
    place = place_of(depth, len(pairs))
    pairs[place] = pair_of(letters[0], rng)
    scene = draw_frames(pairs, grid, rng)
    if fills_frame:
        scene[place] = draw_frames([pairs[place]], grid, rng, whole=True)[0]
    return Conversation(VIDEO, [scene], [(f"{letters[0]}?", pairs[place][1])])


def distractors(tokens: int, depth: float, rng: Rng) -> Conversation:
    """One pair shown once among a few that come back in a fixed period (V-NIAH-D)."""
    letters = conversations.shuffled_letters(rng)
    cycle = [pair_of(letter, rng) for letter in letters[1 : 1 + PERIOD]]
    pairs = [cycle[index % PERIOD] for index in range(tokens // SMALL.tokens)]
    place = place_of(depth, len(pairs))
    pairs[place] = pair_of(letters[0], rng)
    return Conversation(
        VIDEO, [draw_frames(pairs, SMALL, rng)], [(f"{letters[0]}?", pairs[place][1])]
    )


def page(tokens: int, depth: float, rng: Rng) -> Conversation:
    """The pair on the page of a given number, each page some pictures below its heading."""
    num_pages, heading_tokens = conversations.NUM_PAGES, 6
    frames_each = max(1, (tokens // num_pages - heading_tokens) // SQUARE.tokens)
    talk = conversations.pages_conversation(num_pages, frames_each, 0, SQUARE, rng)
    place = place_of(depth, num_pages)
    number = talk.content.split("page")[place + 1][0]
    pair = pair_of(conversations.shuffled_letters(rng)[0], rng)
    talk.scenes[place] = conversations.page_pictures(pair, frames_each, SQUARE, rng)
    return replace(talk, turns=[(f"page{number}?", pair)])


def appearances(
    tokens: int, depth: float, rng: Rng, count: int
) -> tuple[str, list[str], np.ndarray]:
    """A letter shown `count` times with different digits, the first time at `depth`.

    Returns:
        (letter, its digits in order, scene)
    """
    letters = conversations.shuffled_letters(rng)
    num_frames = tokens // SQUARE.tokens
    pairs = background(num_frames, letters[1:], rng)
    first = min(place_of(depth, num_frames), num_frames - count)
    later = first + 1 + np.sort(rng.permutation(num_frames - first - 1)[: count - 1])
    digits = [str(digit) for digit in rng.permutation(10)[:count]]
    for place, digit in zip([first, *later.tolist()], digits, strict=True):
        pairs[place] = letters[0] + digit
    return letters[0], digits, draw_frames(pairs, SQUARE, rng)


def first_shown(tokens: int, depth: float, rng: Rng) -> Conversation:
    letter, digits, scene = appearances(tokens, depth, rng, int(rng.integers(2, 5)))
    return Conversation(VIDEO, [scene], [(f"{letter} first?", digits[0])])


def last_shown(tokens: int, depth: float, rng: Rng) -> Conversation:
    """As `first_shown`, played backwards."""
    letter, digits, scene = appearances(tokens, 1.0 - depth, rng, int(rng.integers(2, 5)))
    return Conversation(VIDEO, [scene[::-1].copy()], [(f"{letter} last?", digits[0])])


def change(tokens: int, depth: float, rng: Rng) -> Conversation:
    letter, digits, scene = appearances(tokens, depth, rng, 2)
    return Conversation(VIDEO, [scene], [(f"{letter} change?", "".join(digits))])


def count(tokens: int, depth: float, rng: Rng) -> Conversation:
    del depth
    times = int(rng.integers(1, 6))
    letter, _, scene = appearances(tokens, 0.1, rng, times)
    return Conversation(VIDEO, [scene], [(f"{letter} count?", str(times))])


def order(tokens: int, depth: float, rng: Rng) -> Conversation:
    """Which of two letters is shown earlier; the earlier one is at `depth`."""
    letters = conversations.shuffled_letters(rng)
    pairs = background(tokens // SQUARE.tokens, letters[2:], rng)
    place = min(place_of(depth, len(pairs)), len(pairs) - 2)
    later = int(rng.integers(place + 1, len(pairs)))
    pairs[place], pairs[later] = pair_of(letters[0], rng), pair_of(letters[1], rng)
    one, other = rng.permutation(letters[:2])
    turn = (f"{one}{other} first?", letters[0])
    return Conversation(VIDEO, [draw_frames(pairs, SQUARE, rng)], [turn])


def following(tokens: int, depth: float, rng: Rng) -> Conversation:
    """The pair in the frame behind a letter."""
    letters = conversations.shuffled_letters(rng)
    pairs = background(tokens // SQUARE.tokens, letters[1:], rng)
    place = min(place_of(depth, len(pairs)), len(pairs) - 2)
    pairs[place] = pair_of(letters[0], rng)
    pairs[place + 1] = conversations.random_pair(letters[1:], rng)
    turn = (f"{letters[0]} next?", pairs[place + 1])
    return Conversation(VIDEO, [draw_frames(pairs, SQUARE, rng)], [turn])


def note(tokens: int, depth: float, rng: Rng) -> Conversation:
    """A text note between short videos that show the same letters."""
    num_videos, note_tokens = 16, 7
    frames_each = max(1, (tokens // num_videos - note_tokens) // SQUARE.tokens)
    talk = conversations.notes_conversation(num_videos, frames_each, 0, SQUARE, rng)
    place = place_of(depth, num_videos)
    text = talk.content.split("note:")[place + 1][:2]
    return replace(talk, turns=[(f"note:{text[0]}?", text[1])])


def ahead(tokens: int, depth: float, rng: Rng) -> Conversation:
    """The question stands before the video."""
    talk = needle(tokens, depth, rng, SQUARE)
    ((question, answer),) = talk.turns
    return replace(talk, content="", turns=[(question + talk.content, answer)])


def second_turn(tokens: int, depth: float, rng: Rng) -> Conversation:
    """A second question about the same video, after the first was answered."""
    letters = conversations.shuffled_letters(rng)
    pairs = background(tokens // SMALL.tokens, letters[2:], rng)
    place = place_of(depth, len(pairs))
    other = int(rng.integers(len(pairs) - 1))
    other += other >= place
    pairs[place], pairs[other] = pair_of(letters[0], rng), pair_of(letters[1], rng)
    turns = [(f"{pairs[other][0]}?", pairs[other][1]), (f"{pairs[place][0]}?", pairs[place][1])]
    return Conversation(VIDEO, [draw_frames(pairs, SMALL, rng)], turns)


def detail(tokens: int, depth: float, rng: Rng) -> Conversation:
    return needle(tokens, depth, rng, SQUARE)


def whole(tokens: int, depth: float, rng: Rng) -> Conversation:
    return needle(tokens, depth, rng, SQUARE, fills_frame=True)


TASKS: dict[str, Task] = {
    "needle": Task("needle", "what stands beside K, shown once", needle),
    "distractors": Task("periodic distractors", "the same among a few that come back", distractors),
    "page": Task("page by number", "the pair on page 3", page),
    "first": Task("first appearance", "the digit when K was shown first", first_shown),
    "last": Task("last appearance", "the digit when K was shown last", last_shown),
    "order": Task("order", "which of two letters came first", order),
    "next": Task("next frame", "the pair behind K", following),
    "count": Task("counting", "how many frames show K", count, has_depth=False),
    "change": Task("change", "K's digit before and after", change),
    "note": Task("text needle", "a note in text between videos", note),
    "ahead": Task("question first", "the question stands before the video", ahead),
    "second": Task("second question", "another question on the same video", second_turn),
    "detail": Task("one-token detail", "a sign in one of 16 cells of a frame", detail),
    "whole": Task("whole frame", "a sign in all 16 cells of a frame", whole),
}
