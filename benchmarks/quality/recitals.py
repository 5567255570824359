"""Conversations that show pairs again and again: where looking up is learnt first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.quality.conversations import (
    NUM_PAGES,
    VIDEO,
    Conversation,
    draw_frames,
    needle_turn,
    shuffled_letters,
)

if TYPE_CHECKING:
    from benchmarks.quality.conversations import Grid, Rng


def recital_conversation(
    num_frames: int, num_others: int, num_turns: int, grid: Grid, rng: Rng
) -> Conversation:
    """A video, then pairs of it and others in text, again and again: dense practice in looking up.

    Every digit behind a letter that the video or the text before has shown is to be learnt.
    Without frames the video is one of background, and no question follows.
    """
    letters = shuffled_letters(rng)[: num_frames + num_others]
    listed = [f"{letter}{rng.integers(10)}" for letter in letters]
    shown = listed[:num_frames]
    talk = Conversation(VIDEO, [draw_frames(shown or [""], grid, rng)])
    known = set(shown)
    for index in rng.integers(0, len(listed), 3 * len(listed)):
        letter, digit = listed[index]
        talk.content += letter
        talk.write(digit, learnt=listed[index] in known)
        known.add(listed[index])
    talk.turns = [needle_turn(shown, rng) for _ in range(num_turns)] if shown else [("read", "")]
    return talk


def index_conversation(num_numbers: int, num_entries: int, grid: Grid, rng: Rng) -> Conversation:
    """Numbers with a letter each, again and again; a letter that comes again is to be learnt."""
    numbers = rng.permutation(NUM_PAGES)[:num_numbers]
    letters = shuffled_letters(rng)
    talk = Conversation(VIDEO, [draw_frames([""], grid, rng)], [("read", "")])
    known = set()
    for index in rng.integers(0, num_numbers, num_entries).tolist():
        talk.content += f";{numbers[index]}"
        talk.write(letters[index], learnt=index in known)
        known.add(index)
    return talk
