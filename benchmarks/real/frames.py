"""Tasks on frames: needles shown among prose, for the model with eyes.

Signs are frames of one sentence each; pages are a text that runs on from frame to frame, so that a
sentence may begin on one and end on the next. All that is shown consists of the tokens that can be
drawn (`cells.py`), so the same words as text would be the same rows for the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.real import prose
from benchmarks.real.cells import BREAK, CELLS, cells_of, draw_frames, vocabulary
from benchmarks.real.eyes import FRAME_TOKENS, IMAGE
from benchmarks.real.tasks import (
    DEPTHS,
    NUM_KEYS,
    QUIZ,
    SUITE,
    Example,
    Needle,
    number,
    plain,
    reversed_needle,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    Rng = np.random.Generator

SHORTEST = 4  # tokens of a sentence of the prose


def far(key: str, value: str) -> str:
    """Words that can be drawn between the key and its value, on three frames."""
    return (
        f"One of the special magic numbers for {key}, which the old man of the gate put in his "
        f"book before he went away to the sea, is: {value}."
    )


@dataclass(frozen=True)
class FrameTask:
    """A kind of question about frames.

    Attributes:
        title: for tables.
        needle: sentence with a key and a value.
        keys: needles, of which the first is asked for.
        runs_on: pages in place of signs.
        asks_first: whether the question stands before the frames.
    """

    title: str
    needle: Needle = plain
    keys: int = 1
    runs_on: bool = False
    asks_first: bool = False


FRAME_TASKS: dict[str, FrameTask] = {
    "sign": FrameTask("one sign"),
    "signs": FrameTask("one of four signs", keys=NUM_KEYS),
    "sign-reversed": FrameTask("sign, value first", needle=reversed_needle),
    "sign-far": FrameTask("sign, value afar", needle=far),
    "page": FrameTask("pages", runs_on=True),
    "sign-asked": FrameTask("sign, question first", asks_first=True),
}


@dataclass(frozen=True)
class FrameExample(Example):
    """An example whose content has a place for each frame.

    Attributes:
        cells: of every frame, rows of the vocabulary.
        seed: of colours and scenery.
    """

    cells: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def inputs(self, tokenizer: PreTrainedTokenizerBase, behind: str = "") -> Any:
        rng = np.random.default_rng(self.seed)
        frames = draw_frames(np.array(self.cells), vocabulary(tokenizer), rng)
        text = self.prompt(tokenizer) + behind
        return {"prompt": text, "multi_modal_data": {"image": list(frames)}}


def make_frame_examples(
    name: str, length_tokens: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[FrameExample]:
    """`count` examples of a task, all depths equally often."""
    return [frame_example(name, length_tokens, index, tokenizer) for index in range(count)]


def frame_example(
    name: str, length_tokens: int, index: int, tokenizer: PreTrainedTokenizerBase
) -> FrameExample:
    """One example: its key, its value and its prose follow from task, length and index."""
    task, depth = FRAME_TASKS[name], DEPTHS[index % len(DEPTHS)]
    seed = [SUITE, sum(map(ord, name)), length_tokens, index]
    rng = np.random.default_rng(seed)
    words = vocabulary(tokenizer)
    keys = rng.choice(words.keys, size=task.keys, replace=False).tolist()
    values = [number(rng) for _ in keys]
    what = f"special magic number for {keys[0]} mentioned in the provided text"
    question, prefix = f"\nWhat is the {what}?", f"The {what} is"
    fixed = tokenizer(QUIZ + question + prefix, add_special_tokens=False)["input_ids"]
    num_frames = (length_tokens - len(fixed) - 40) // FRAME_TOKENS  # 40 of the template and answer
    needles = [
        tokenizer(" " + task.needle(key, value), add_special_tokens=False)["input_ids"]
        for key, value in zip(keys, values, strict=True)
    ]
    lay_out = pages if task.runs_on else signs
    tokens = lay_out(needles, drawable(tokenizer), num_frames, depth, rng, blank_of(tokenizer))
    shown = cells_of(tokens, words, blank_of(tokenizer))
    places = IMAGE * len(shown)
    content = QUIZ + (question.strip() + "\n" + places if task.asks_first else places + question)
    return FrameExample(
        task=name,
        length_tokens=length_tokens,
        depth=depth,
        content=content,
        prefix=prefix,
        answers=(values[0],),
        told=" " + values[0],
        cells=tuple(tuple(frame) for frame in shown.tolist()),
        seed=int(rng.integers(2**31)),
    )


def blank_of(tokenizer: PreTrainedTokenizerBase) -> int:
    (token,) = tokenizer(BREAK, add_special_tokens=False)["input_ids"]
    return token


@cache
def drawable(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Sentences of the prose all of whose tokens can be drawn, as tokens."""
    known = vocabulary(tokenizer).index.keys()
    sentences = [s for block in prose.paragraphs() for s in prose.SENTENCE_END.split(block)]
    found = tokenizer([" " + s for s in sentences], add_special_tokens=False)["input_ids"]
    return tuple(tuple(s) for s in found if len(s) >= SHORTEST and known >= set(s))


def signs(
    needles: Sequence[Sequence[int]],
    sentences: Sequence[Sequence[int]],
    num_frames: int,
    depth: float,
    rng: Rng,
    blank: int,
) -> list[int]:
    """Frames that each begin a sentence or go on with it: the first needle at its depth, the others
    anywhere, sentences by lot. Tokens, CELLS of each frame."""

    def framed(tokens: Sequence[int]) -> list[int]:
        return [*tokens, *[blank] * (-len(tokens) % CELLS)]

    shown = [framed(needle) for needle in needles]
    room = num_frames * CELLS - sum(map(len, shown))
    pieces: list[list[int]] = []
    for index in rng.permutation(len(sentences)):
        piece = framed(sentences[index])
        if len(piece) <= room:
            pieces.append(piece)
            room -= len(piece)
        if not room:
            break
    first = round(depth * len(pieces))
    for needle in shown[1:]:
        place = int(rng.integers(len(pieces) + 1))
        first += place <= first
        pieces.insert(place, needle)
    pieces.insert(first, shown[0])
    return [token for piece in pieces for token in piece]


def pages(
    needles: Sequence[Sequence[int]],
    sentences: Sequence[Sequence[int]],
    num_frames: int,
    depth: float,
    rng: Rng,
    blank: int,
) -> list[int]:
    """A text that fills all frames, with the needle between two sentences nearest to its depth."""
    (needle,) = needles
    room = num_frames * CELLS - len(needle)
    pieces: list[list[int]] = []
    for index in rng.permutation(len(sentences)):
        piece = list(sentences[index])
        if len(piece) > room:
            break
        pieces.append(piece)
        room -= len(piece)
    ends = np.cumsum([0, *map(len, pieces)])
    pieces.insert(int(np.abs(ends - depth * ends[-1]).argmin()), list(needle))
    return [token for piece in pieces for token in piece] + [blank] * room
