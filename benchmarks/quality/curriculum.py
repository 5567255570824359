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

SMALL, WIDE, SQUARE, LARGE = Grid(2, 2), Grid(2, 4), Grid(4, 4), Grid(4, 8)
GRIDS: tuple[Grid, ...] = (SMALL, WIDE, SQUARE, LARGE)
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
    """

    name: str
    steps: int
    shares: Mapping[str, float]
    vision_tokens: int
    grids: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)
    turns: int = 8


ALL = {"video": 0.25, "again": 0.3, "read": 0.03, "pages": 0.15, "notes": 0.15, "ahead": 0.12}
EQUAL = (0.4, 0.15, 0.35, 0.1)
STAGES = (
    Stage("letters", 900, {"read": 1.0}, 4, turns=2),
    Stage("few frames", 700, {"read": 0.3, "needles": 0.7}, 16),
    Stage("more frames", 1100, {**ALL, "needles": 0.1}, 64, (0.85, 0.05, 0.1, 0.0)),
    Stage("clips", 1200, ALL, 256, EQUAL),
    Stage("videos", 600, ALL, 1024, EQUAL, turns=12),
    Stage("long videos", 400, ALL, 4096, EQUAL, turns=16),
)
LAST_STEP = sum(stage.steps for stage in STAGES)
MOST_ROWS = 128
TURN_TOKENS = 12


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
    grid = GRIDS[rng.choice(len(GRIDS), p=np.array(stage.grids) / sum(stage.grids))]
    most = max(1, stage.vision_tokens // grid.tokens)
    least = max(1, min(4, most // 4))
    num_frames = round(float(np.exp(rng.uniform(np.log(least), np.log(most)))))
    turns = stage.turns
    if family == "read":
        num_frames = min(num_frames, 16)
    elif family in ("pages", "notes"):
        num_frames = min(num_frames, 60)
    elif family == "ahead":
        turns = min(turns, num_frames)
    length = 16 + num_frames * grid.tokens + turns * TURN_TOKENS
    length += 6 * num_frames if family in ("pages", "notes") else 0
    rows = int(np.clip(batch_tokens // length, 2, MOST_ROWS))
    return [draw(family, num_frames, turns, grid, rng) for _ in range(rows)]


def draw(family: str, num_frames: int, turns: int, grid: Grid, rng: Rng) -> Conversation:
    """One conversation of a family of `Stage.shares`."""
    if family == "ahead":
        each = max(1, num_frames // int(rng.integers(1, turns + 1)))
        return conversations.ahead_conversation(max(1, num_frames // each), each, grid, rng)
    if family == "read":
        return conversations.read_conversation(num_frames, turns, grid, rng)
    if family == "pages":
        return conversations.pages_conversation(num_frames, turns, grid, rng)
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
