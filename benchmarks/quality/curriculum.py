"""From one frame to thousands of tokens: which conversations a training step draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import conversations, recitals
from benchmarks.quality.conversations import BEYOND_NEEDLES, VIDEO, Conversation, Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.quality.conversations import Rng

DOT, SMALL, WIDE, SQUARE, LARGE = Grid(1, 1), Grid(2, 2), Grid(2, 4), Grid(4, 4), Grid(4, 8)
GRIDS: tuple[Grid, ...] = (DOT, SMALL, WIDE, SQUARE, LARGE)
ASKED = {
    "needles": ("needle",),
    "video": ("needle", "needle", "first", *BEYOND_NEEDLES),
    "again": ("first", "last", "count", "change", "order"),
    "next": ("next",),
    "compare": ("order", "order", "count"),
}


@dataclass(frozen=True)
class Stage:
    """Some steps that draw alike.

    Args:
        name: for the log.
        steps: how many.
        shares: how often each family of conversations is drawn.
        vision_tokens: most vision tokens of a conversation; lengths are drawn log-uniformly.
        grids: how often each of `GRIDS` is drawn.
        turns: questions of a conversation.
        shortest: fewest vision tokens, as a share of `vision_tokens`.
        practice: how often questions and answers stand densely in the content; see
            `Conversation.practise`.
    """

    name: str
    steps: int
    shares: Mapping[str, float]
    vision_tokens: int
    grids: tuple[float, ...] = (1.0,)
    turns: int = 8
    shortest: float = 0.0
    practice: float = 0.0


# The first stages teach to look up, one small step after the other: what stands behind a letter and
# behind a number; then behind a heading, in text; then the same with pictures among the text.
LOOK_UP = {"text": 0.34, "index": 0.33, "listed": 0.33}
PICTURES = {"recital": 0.36, "needles": 0.14, "mixed list": 0.36, "mixed pages": 0.14}
PAGES = {"recital": 0.12, "needles": 0.13, "mixed list": 0.5, "mixed pages": 0.13, "written": 0.12}
ALL = {
    "video": 0.1,
    "again": 0.22,
    "next": 0.02,
    "compare": 0.16,
    "ahead": 0.14,
    "pages": 0.16,
    "mixed list": 0.06,
    "notes": 0.08,
    "recital": 0.05,
    "read": 0.01,
}
LONG = {
    "needles": 0.14,
    "video": 0.14,
    "again": 0.2,
    "compare": 0.12,
    "ahead": 0.14,
    "pages": 0.12,
    "notes": 0.12,
    "recital": 0.02,
}
HARD = {
    "video": 0.05,
    "again": 0.2,
    "compare": 0.48,
    "ahead": 0.08,
    "pages": 0.12,
    "notes": 0.05,
    "recital": 0.02,
}
LONGEST = {
    "needles": 0.16,
    "video": 0.12,
    "again": 0.2,
    "compare": 0.22,
    "ahead": 0.08,
    "pages": 0.12,
    "notes": 0.07,
    "recital": 0.03,
}
MIXED = (0.05, 0.35, 0.1, 0.4, 0.1)
STAGES = (
    Stage("text", 450, LOOK_UP, 1, turns=1),
    Stage("letters", 100, {"read": 1.0}, 1, turns=1),
    Stage("pictures", 500, PICTURES, 12, turns=8, practice=1.0),
    Stage("pages", 600, PAGES, 12, turns=8, practice=1.0),
    Stage("dots", 900, ALL, 32, (0.7, 0.3), turns=16, practice=0.5),
    Stage("more frames", 800, ALL, 96, (0.3, 0.35, 0.1, 0.25), turns=16, practice=0.4),
    Stage("clips", 650, ALL, 384, MIXED, turns=16, practice=0.4),
    Stage("videos", 400, ALL, 1536, MIXED, turns=16, shortest=1 / 32, practice=0.3),
    Stage("long videos", 400, ALL, 4096, MIXED, turns=24, shortest=1 / 16, practice=0.3),
    Stage("many frames", 600, LONG, 3072, (0.0, 0.6, 0.1, 0.3), 24, shortest=1 / 4, practice=0.3),
    Stage("comparisons", 1400, HARD, 384, MIXED, turns=16, practice=0.5),
    Stage("more frames to compare", 1000, HARD, 576, (0.4, 0.4, 0.0, 0.2), 24, 1 / 8, practice=0.5),
    Stage("long comparisons", 700, HARD, 3072, (0.0, 0.4, 0.1, 0.5), 24, 1 / 6, practice=0.3),
    Stage("longest", 700, LONGEST, 4096, (0.0, 0.6, 0.0, 0.4), 24, 1 / 3, practice=0.3),
)
LAST_STEP = sum(stage.steps for stage in STAGES)
MOST_ROWS = 128
TURN_TOKENS, PRACTISED_TOKENS = 12, 5
# "again": beyond, the lowest frequency of the time axis has turned too far to compare
MOST_FRAMES = {"read": 16, "notes": 144, "recital": 8, "again": 144, "compare": 144}
# of one frame
TEXT_TOKENS = {
    "pages": 6,
    "mixed pages": 10,
    "mixed list": 14,
    "notes": 6,
    "recital": 18,
    "text": 36,
    "index": 60,
    "listed": 100,
    "written": 110,
}
# share of the pages that have text in place of pictures
WRITTEN = {"pages": 0.0, "mixed pages": 0.4, "mixed list": 0.4, "listed": 1.0, "written": 1.0}
PRACTISED = (*ASKED, "pages", "mixed pages", "written", "notes")
ALWAYS_ASKED = 2  # in a turn of the chat


def stage_at(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


def rng_of(seed: int, step: int) -> Rng:
    """The generator of one step, so that a resumed run draws what the whole run would."""
    return np.random.default_rng([seed, step])


def sample(step: int, batch_tokens: int, rng: Rng) -> list[Conversation]:
    """Conversations of one batch: one family, one size of frame, about one length."""
    stage = stage_at(step)
    names = sorted(stage.shares)
    weights = np.array([stage.shares[name] for name in names])
    family = names[rng.choice(len(names), p=weights / weights.sum())]
    shares = np.array(stage.grids)
    grid = GRIDS[rng.choice(len(shares), p=shares / shares.sum())]
    most = max(1, stage.vision_tokens // grid.tokens)
    least = max(1, min(4, most // 4), int(stage.shortest * most))
    num_frames = round(float(np.exp(rng.uniform(np.log(least), np.log(most)))))
    num_frames = min(num_frames, MOST_FRAMES.get(family, num_frames))
    turns = min(stage.turns, num_frames) if family == "ahead" else stage.turns
    practised = family in PRACTISED and rng.random() < stage.practice
    turn_tokens = PRACTISED_TOKENS if practised else TURN_TOKENS
    length = 16 + num_frames * grid.tokens + turns * turn_tokens
    length += num_frames * TEXT_TOKENS.get(family, 0)
    rows = int(np.clip(batch_tokens // length, 2, MOST_ROWS))
    talks = [draw(family, num_frames, turns, grid, rng) for _ in range(rows)]
    for talk in talks:
        if family in PRACTISED:
            talk.ask_once()
        if practised:
            talk.practise(ALWAYS_ASKED)
    return talks


def draw(family: str, num_frames: int, turns: int, grid: Grid, rng: Rng) -> Conversation:
    """One conversation of a family of `Stage.shares`."""
    if family == "ahead":
        each = max(1, round(num_frames / float(np.exp(rng.uniform(0.0, np.log(turns))))))
        return conversations.ahead_conversation(max(1, num_frames // each), each, grid, rng)
    if family == "read":
        return conversations.read_conversation(num_frames, turns, grid, rng)
    if family == "recital":
        return recitals.recital_conversation(num_frames, 2 * num_frames, turns, grid, rng)
    if family == "index":
        num_numbers = int(rng.integers(3, conversations.NUM_PAGES + 1))
        return recitals.index_conversation(num_numbers, 3 * num_numbers, grid, rng)
    if family == "text":
        return recitals.recital_conversation(0, int(rng.integers(3, 10)), turns, grid, rng)
    if family in WRITTEN:
        return _pages(family, num_frames, turns, grid, rng)
    if family == "notes":
        each = max(1, num_frames // int(rng.integers(2, 9)))
        return conversations.notes_conversation(max(1, num_frames // each), each, turns, grid, rng)
    return conversations.video_conversation(
        num_frames,
        turns,
        grid,
        rng,
        kinds=ASKED[family],
        blank=float(rng.choice([0.0, 0.3, 0.8])),
        periodic=bool(rng.random() < 0.2),
        whole=bool(rng.random() < 0.25),
    )


def _pages(family: str, num_frames: int, turns: int, grid: Grid, rng: Rng) -> Conversation:
    """Pages of a family of `WRITTEN`; where all but one are written, frames do not limit them."""
    written = WRITTEN[family]
    most = conversations.NUM_PAGES if written == 1.0 else min(num_frames, conversations.NUM_PAGES)
    num_pages = min(most, int(rng.integers(2, conversations.NUM_PAGES + 1)))
    each = max(1, num_frames // num_pages)
    if "list" in family:
        return conversations.listed_conversation(num_pages, each, grid, rng, written=written)
    return conversations.pages_conversation(num_pages, each, turns, grid, rng, written=written)


def kind_of(question: str) -> str:
    """Kind of a question by its words, for the log."""
    if VIDEO in question:
        return "ahead"
    for word in ("page", "note", "read"):
        if question.startswith(word):
            return word
    words = question.rstrip("?").split(" ")
    if len(words) == 1:
        return "needle"
    return words[1] if len(words[0]) == 1 else "order"
