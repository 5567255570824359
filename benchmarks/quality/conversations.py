"""Conversations about scenes, with the answers: what the model is trained on.

A turn asks one of these (K is any letter):

    K?          the digit beside K, which is shown once            7
    K first?    K was shown with several digits: the earliest      3
    K last?     the latest                                         9
    K change?   the earliest and the latest                        39
    K count?    in how many frames K is shown                      4
    K next?     the pair in the frame behind K                     A2
    KA first?   which of the two is shown earlier                  K
    page3?      the pair among the pictures headed "page3:"        B5
    note:Q?     the digit of the text note "note:Q5;"              5
    read        all pairs, in order                                K7A2B5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import scenes
from benchmarks.quality.scenes import LETTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NUM_PAGES = 10
# kinds of questions about letters that come back
REPEATED = ("first", "last", "count", "change")
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VIDEO = f"{VISION_START}<|video_pad|>{VISION_END}"

Rng = np.random.Generator


@dataclass
class Conversation:
    """Text with markers, the scenes behind the markers, and questions with answers.

    Attributes:
        content: text of the first user turn before its question, each `VIDEO` a scene.
        scenes: int [F, rows, columns] of cell ids, one for each `VIDEO`.
        turns: (question, answer); the first question follows `content`.
        learnt: places in `content` of characters that are to be predicted too, as answers are.
    """

    content: str = ""
    scenes: list[np.ndarray] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)

    def write(self, answer: str, *, learnt: bool = True) -> None:
        """Adds an answer to `content`, if `learnt` to be predicted there."""
        if learnt:
            self.learnt += range(len(self.content), len(self.content) + len(answer))
        self.content += answer

    def ask_once(self) -> None:
        """Drops questions that were asked before: their answers could be copied."""
        self.turns = list(dict(self.turns).items())

    def practise(self, num_asked: int) -> None:
        """Moves all but the last `num_asked` turns into `content`, where answers are denser."""
        early, self.turns = self.turns[:-num_asked], self.turns[-num_asked:]
        for question, answer in early:
            self.content += question
            self.write(answer)
            self.content += ";"


@dataclass(frozen=True)
class Grid:
    """Rows and columns of cells of one frame."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def draw_frames(pairs: Sequence[str], grid: Grid, rng: Rng, *, whole: bool = False) -> np.ndarray:
    """A scene that shows one pair in each frame, "" for none.

    Args:
        pairs: what each frame shows.
        grid: size of the frames.
        rng: chooses the cell of the pair, its drawing and the landscape.
        whole: fill the frame with the pair instead of one cell.

    Returns:
        int [F, rows, columns] of cell ids.
    """
    size = (len(pairs), grid.rows, grid.columns)
    first = scenes.landscape_id(0)
    scene = rng.integers(first, first + scenes.NUM_LANDSCAPES, size)
    rows, columns = (
        rng.integers(0, grid.rows, len(pairs)),
        rng.integers(0, grid.columns, len(pairs)),
    )
    variants = rng.integers(0, scenes.NUM_VARIANTS, len(pairs))
    for index, pair in enumerate(pairs):
        if not pair:
            continue
        sign = scenes.sign_id(pair, int(variants[index]))
        if whole:
            scene[index] = sign
        else:
            scene[index, rows[index], columns[index]] = sign
    return scene


def random_pair(letters: Sequence[str], rng: Rng) -> str:
    return f"{letters[rng.integers(len(letters))]}{rng.integers(10)}"


def shuffled_letters(rng: Rng) -> list[str]:
    return [LETTERS[i] for i in rng.permutation(len(LETTERS))]


def read_conversation(num_frames: int, num_turns: int, grid: Grid, rng: Rng) -> Conversation:
    """A short video that is read aloud, then asked about."""
    letters = shuffled_letters(rng)[:num_frames]
    pairs = [f"{letter}{rng.integers(10)}" for letter in letters]
    talk = Conversation(VIDEO, [draw_frames(pairs, grid, rng)])
    talk.turns.append(("read", "".join(pairs)))
    talk.turns += [needle_turn(pairs, rng) for _ in range(num_turns - 1)]
    return talk


def needle_turn(pairs: Sequence[str], rng: Rng) -> tuple[str, str]:
    pair = pairs[rng.integers(len(pairs))]
    return f"{pair[0]}?", pair[1]


def video_conversation(
    num_frames: int,
    num_turns: int,
    grid: Grid,
    rng: Rng,
    *,
    kinds: Sequence[str] = ("needle",),
    blank: float = 0.0,
    periodic: bool = False,
    whole: bool = False,
) -> Conversation:
    """A video with letters that are shown once, letters that come back, and background.

    Args:
        num_frames: frames of the video, 1 or more.
        num_turns: questions.
        grid: size of the frames.
        rng: of everything.
        kinds: what may be asked: "needle" and keys of `BEYOND_NEEDLES`.
        blank: share of the background frames that show nothing.
        periodic: background letters come in a fixed cycle.
        whole: the letters that are asked about fill their frames.
    """
    plan = _Plan.make(num_frames, rng, kinds=kinds, blank=blank, periodic=periodic)
    scene = draw_frames(plan.pairs, grid, rng)
    if whole:
        asked = np.array([pair[:1] in plan.once + plan.often for pair in plan.pairs])
        scene[asked] = draw_frames(plan.pairs, grid, rng, whole=True)[asked]
    turns = [plan.turn(kinds[rng.integers(len(kinds))], rng) for _ in range(num_turns)]
    return Conversation(VIDEO, [scene], turns)


def ahead_conversation(num_videos: int, frames_each: int, grid: Grid, rng: Rng) -> Conversation:
    """One video a turn, each behind its question; a letter may have been in an earlier video."""
    talk = Conversation()
    for _ in range(num_videos):
        plan = _Plan.make(frames_each, rng, kinds=("needle",), blank=0.3, periodic=False)
        question, answer = plan.turn("needle", rng)
        talk.turns.append((f"{question}{VIDEO}", answer))
        talk.scenes.append(draw_frames(plan.pairs, grid, rng))
    return talk


@dataclass
class _Plan:
    """Which frame shows which pair."""

    pairs: list[str]
    once: list[str]
    often: list[str]

    @classmethod
    def make(
        cls, num_frames: int, rng: Rng, *, kinds: Sequence[str], blank: float, periodic: bool
    ) -> _Plan:
        letters = shuffled_letters(rng)
        recurring = num_frames >= 4 and any(kind in REPEATED for kind in kinds)
        num_often = int(rng.integers(1, min(5, (num_frames + 1) // 2))) if recurring else 0
        room = num_frames - 2 * num_often
        num_once = int(np.clip(rng.integers(max(1, room // 2), room + 1), 1, 10))
        once, often = letters[:num_once], letters[num_once : num_once + num_often]
        rest = letters[num_once + num_often :]
        shown = [f"{letter}{rng.integers(10)}" for letter in once]
        budget = num_frames - num_once
        for index, letter in enumerate(often):
            left = budget - 2 * (len(often) - index - 1)
            count = int(rng.integers(2, max(2, min(6, left)) + 1))
            shown += [f"{letter}{rng.integers(10)}" for _ in range(count)]
            budget -= count
        shown = shown[:num_frames]
        places = np.sort(rng.permutation(num_frames)[: len(shown)])
        pairs = cls._background(num_frames, rest, rng, blank, periodic)
        for place, index in zip(places, rng.permutation(len(shown)), strict=True):
            pairs[place] = shown[index]
        return cls(pairs, once, often)

    @staticmethod
    def _background(
        num_frames: int, letters: list[str], rng: Rng, blank: float, periodic: bool
    ) -> list[str]:
        if periodic:
            cycle = [random_pair(letters, rng) for _ in range(int(rng.integers(2, 7)))]
            return [cycle[index % len(cycle)] for index in range(num_frames)]
        empty = rng.random(num_frames) < blank
        return ["" if empty[index] else random_pair(letters, rng) for index in range(num_frames)]

    def turn(self, kind: str, rng: Rng) -> tuple[str, str]:
        if kind == "needle" or (kind in REPEATED and not self.often):
            letter = self.once[rng.integers(len(self.once))]
            return f"{letter}?", self.digits(letter)[0]
        return BEYOND_NEEDLES[kind](self, rng)

    def digits(self, letter: str) -> list[str]:
        return [pair[1] for pair in self.pairs if pair[:1] == letter]

    def recurring_letter(self, rng: Rng) -> str:
        return self.often[rng.integers(len(self.often))]


def _first(plan: _Plan, rng: Rng) -> tuple[str, str]:
    letter = plan.recurring_letter(rng)
    return f"{letter} first?", plan.digits(letter)[0]


def _last(plan: _Plan, rng: Rng) -> tuple[str, str]:
    letter = plan.recurring_letter(rng)
    return f"{letter} last?", plan.digits(letter)[-1]


def _change(plan: _Plan, rng: Rng) -> tuple[str, str]:
    letter = plan.recurring_letter(rng)
    digits = plan.digits(letter)
    return f"{letter} change?", digits[0] + digits[-1]


def _count(plan: _Plan, rng: Rng) -> tuple[str, str]:
    letter = (plan.often + plan.once)[rng.integers(min(len(plan.often) + 1, 5))]
    return f"{letter} count?", str(len(plan.digits(letter)))


def _next(plan: _Plan, rng: Rng) -> tuple[str, str]:
    """The pair behind a letter that is shown once; asked only where there is one."""
    letters = [pair[:1] for pair in plan.pairs]
    places = [letters.index(letter) for letter in plan.once]
    places = [p for p in places if p + 1 < len(plan.pairs) and plan.pairs[p + 1]]
    if not places:
        return plan.turn("needle", rng)
    place = places[rng.integers(len(places))]
    return f"{letters[place]} next?", plan.pairs[place + 1]


def _order(plan: _Plan, rng: Rng) -> tuple[str, str]:
    if len(plan.once) < 2:
        return plan.turn("needle", rng)
    letters = [pair[:1] for pair in plan.pairs]
    one, other = (plan.once[i] for i in rng.permutation(len(plan.once))[:2])
    return f"{one}{other} first?", min(one, other, key=letters.index)


BEYOND_NEEDLES: dict[str, Callable[[_Plan, Rng], tuple[str, str]]] = {
    "first": _first,
    "last": _last,
    "change": _change,
    "count": _count,
    "next": _next,
    "order": _order,
}


def pages_conversation(
    num_pages: int,
    frames_each: int,
    num_turns: int,
    grid: Grid,
    rng: Rng,
    *,
    written: float = 0.0,
) -> Conversation:
    """Up to ten headed pages of some pictures, one of them with a pair; asked for by number.

    Of the pages behind the first, a share `written` has the pair in text in place of pictures.
    """
    talk, pairs = _headed_pages(num_pages, frames_each, grid, rng, written)
    numbers = list(pairs)
    for index in rng.integers(0, num_pages, num_turns).tolist():
        talk.turns.append((f"page{numbers[index]}?", pairs[numbers[index]]))
    return talk


def listed_conversation(
    num_pages: int, frames_each: int, grid: Grid, rng: Rng, *, written: float
) -> Conversation:
    """Pages, then an index of all but one, which is asked for: dense practice in finding a heading.

    The pair behind every number of the index is to be learnt.
    """
    talk, pairs = _headed_pages(num_pages, frames_each, grid, rng, written)
    *listed, asked = rng.permutation(list(pairs)).tolist()
    for number in listed:
        talk.content += f";{number}"
        talk.write(pairs[number])
    talk.turns.append((f"page{asked}?", pairs[asked]))
    return talk


def _headed_pages(
    num_pages: int, frames_each: int, grid: Grid, rng: Rng, written: float
) -> tuple[Conversation, dict[int, str]]:
    """(pages without a question, the pair of every page by its number)."""
    numbers = rng.permutation(NUM_PAGES)[:num_pages].tolist()
    letters = shuffled_letters(rng)
    pairs = {n: f"{letters[index]}{rng.integers(10)}" for index, n in enumerate(numbers)}
    talk = Conversation()
    for number, pair in pairs.items():
        if written and talk.scenes and rng.random() < written:
            talk.content += f"page{number}:{VISION_START}{pair}{VISION_END}"
            continue
        talk.content += f"page{number}:{VIDEO}"
        talk.scenes.append(page_pictures(pair, frames_each, grid, rng))
    return talk, pairs


def page_pictures(pair: str, num_frames: int, grid: Grid, rng: Rng) -> np.ndarray:
    """Pictures that show one pair, int [F, rows, columns] of cell ids."""
    shown = [""] * num_frames
    shown[rng.integers(num_frames)] = pair
    return draw_frames(shown, grid, rng)


def notes_conversation(
    num_videos: int, frames_each: int, num_turns: int, grid: Grid, rng: Rng
) -> Conversation:
    """Short videos with a text note behind each; the same letters appear in both."""
    letters, noted = shuffled_letters(rng), shuffled_letters(rng)
    talk = Conversation()
    shown: list[str] = []
    notes: list[str] = []
    for index in range(num_videos):
        pairs = [
            f"{letters[(index * frames_each + f) % len(letters)]}{rng.integers(10)}"
            for f in range(frames_each)
        ]
        note = f"{noted[index % len(noted)]}{rng.integers(10)}"
        talk.content += f"{VIDEO}note:{note};"
        talk.scenes.append(draw_frames(pairs, grid, rng))
        shown += pairs
        notes.append(note)
    unique = [pair for pair in shown if sum(p[0] == pair[0] for p in shown) == 1]
    notes = [note for note in notes if sum(n[0] == note[0] for n in notes) == 1]
    for _ in range(num_turns):
        if notes and (not unique or rng.random() < 0.6):
            question, answer = needle_turn(notes, rng)
            talk.turns.append((f"note:{question}", answer))
        else:
            talk.turns.append(needle_turn(unique or shown, rng))
    return talk
