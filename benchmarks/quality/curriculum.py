"""From one frame to thousands of tokens: which conversations a training step draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import conversations
from benchmarks.quality.conversations import RECURRING, VIDEO, Conversation, Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.quality.conversations import Rng

DOT, SMALL, WIDE, SQUARE, LARGE = Grid(1, 1), Grid(2, 2), Grid(2, 4), Grid(4, 4), Grid(4, 8)
GRIDS: tuple[Grid, ...] = (DOT, SMALL, WIDE, SQUARE, LARGE)
KINDS = ("needle", "needle", "first", *RECURRING)
AGAIN = ("first", "last", "count", "change", "order")


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
    """

    name: str
    steps: int
    shares: Mapping[str, float]
    vision_tokens: int
    grids: tuple[float, ...] = (1.0,)
    turns: int = 8
    shortest: float = 0.0


ALL = {
    "video": 0.18,
    "again": 0.3,
    "ahead": 0.12,
    "pages": 0.12,
    "notes": 0.13,
    "recital": 0.12,
    "read": 0.03,
}
# when looking up is learnt, what needs two looks gets more of the steps
HARDER = {
    "video": 0.18,
    "again": 0.42,
    "ahead": 0.08,
    "pages": 0.18,
    "notes": 0.08,
    "recital": 0.02,
    "read": 0.04,
}
MIXED = (0.05, 0.35, 0.1, 0.4, 0.1)
STAGES = (
    Stage("text", 350, {"text": 1.0}, 1, turns=1),
    Stage("letters", 150, {"read": 1.0}, 1, turns=1),
    Stage("recital", 400, {"recital": 0.8, "needles": 0.2}, 12, turns=4),
    Stage("dots", 1200, ALL, 32, (0.7, 0.3), turns=12),
    Stage("more frames", 1200, HARDER, 96, (0.3, 0.35, 0.1, 0.25), turns=12),
    Stage("clips", 800, HARDER, 384, MIXED, turns=12),
    Stage("videos", 500, HARDER, 1536, MIXED, turns=16, shortest=1 / 32),
    Stage("long videos", 400, HARDER, 4096, MIXED, turns=24, shortest=1 / 16),
)
LAST_STEP = sum(stage.steps for stage in STAGES)
MOST_ROWS = 128
TURN_TOKENS = 12
# "again": beyond, the lowest frequency of the time axis has turned too far to compare
MOST_FRAMES = {"read": 16, "notes": 60, "recital": 8, "again": 144}
TEXT_TOKENS = {"pages": 6, "notes": 6, "recital": 18, "text": 36}  # of one frame


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
    length = 16 + num_frames * grid.tokens + turns * TURN_TOKENS
    length += num_frames * TEXT_TOKENS.get(family, 0)
    rows = int(np.clip(batch_tokens // length, 2, MOST_ROWS))
    return [draw(family, num_frames, turns, grid, rng) for _ in range(rows)]


def draw(family: str, num_frames: int, turns: int, grid: Grid, rng: Rng) -> Conversation:
    """One conversation of a family of `Stage.shares`."""
    if family == "ahead":
        each = max(1, num_frames // int(rng.integers(1, turns + 1)))
        return conversations.ahead_conversation(max(1, num_frames // each), each, grid, rng)
    if family == "read":
        return conversations.read_conversation(num_frames, turns, grid, rng)
    if family == "recital":
        return conversations.recital_conversation(num_frames, 2 * num_frames, turns, grid, rng)
    if family == "text":
        return conversations.recital_conversation(0, int(rng.integers(3, 10)), turns, grid, rng)
    if family == "pages":
        num_pages = min(num_frames, int(rng.integers(2, conversations.NUM_PAGES + 1)))
        each = num_frames // num_pages
        return conversations.pages_conversation(num_pages, each, turns, grid, rng)
    if family == "notes":
        each = max(1, num_frames // int(rng.integers(2, 9)))
        return conversations.notes_conversation(max(1, num_frames // each), each, turns, grid, rng)
    kinds = {"needles": ("needle",), "again": AGAIN}.get(family, KINDS)
    return conversations.video_conversation(
        num_frames,
        turns,
        grid,
        rng,
        kinds=kinds,
        blank=float(rng.choice([0.0, 0.3, 0.8])),
        periodic=bool(rng.random() < 0.2),
        whole=bool(rng.random() < 0.25),
    )


def kind_of(question: str) -> str:
    """Kind of a question by its words, for the log."""
    if VIDEO in question:
        return "ahead"
    for word in ("page", "note", "read"):
        if question.startswith(word):
            return word
    words = question.rstrip("?").split(" ")
    if "/" in words[0]:
        return "order"
    return words[1] if len(words) > 1 else "needle"
