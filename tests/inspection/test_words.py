"""The prompt's text: each word has the positions of its tokens, and long prompts are shortened."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inspection.stories import Telling, image, video
from vllm_budgetkv.inspection.words import (
    FIRST_TEXT_TOKENS,
    MOST_TEXT_TOKENS,
    Piece,
    pieces_of,
)

# bytes of each token: a letter of three bytes is cut into three tokens
VOCABULARY = [b"Which", b" letter", b"\xe2", b"\x82", b"\xac", b"?", b"\n", b"<pad>"]
PAD = len(VOCABULARY) - 1


def decode(token_ids: list[int]) -> str:
    return b"".join(VOCABULARY[one] for one in token_ids).decode(errors="replace")


def decode_without_first_blank(token_ids: list[int]) -> str:
    """As vocabularies of SentencePiece do."""
    return decode(token_ids).removeprefix(" ")


def telling(token_ids: list[int], items: list[dict] | None = None) -> Telling:
    kept = np.zeros((1, 1, len(token_ids)), dtype=bool)
    found = Telling(kept, np.array([[True]]), items or [])
    found.token_ids = token_ids
    return found


def test_words_and_items_in_order() -> None:
    token_ids = [0, 1, *[PAD] * 4, 5, 6]
    pieces = pieces_of(telling(token_ids, [image(2, (1, 2, 2))]).story(), decode)
    assert pieces == [
        Piece("text", 0, 1, "Which"),
        Piece("text", 1, 2, " letter"),
        Piece("vision", 2, 6, "image 1"),
        Piece("text", 6, 7, "?"),
        Piece("text", 7, 8, "\n"),
    ]


def test_a_character_of_several_tokens_is_one_piece() -> None:
    pieces = pieces_of(telling([0, 2, 3, 4, 5]).story(), decode)
    assert [(one.text, one.start, one.stop) for one in pieces] == [
        ("Which", 0, 1),
        ("€", 1, 4),
        ("?", 4, 5),
    ]


def test_half_a_character_is_shown_and_delays_no_other() -> None:
    pieces = pieces_of(telling([2, *[0] * 9, 2, 3]).story(), decode)
    assert "".join(one.text for one in pieces).count("Which") == 9
    assert [one.start for one in pieces] == [0, *[one.stop for one in pieces[:-1]]]
    assert pieces[-1].stop == 12 and pieces[0].stop <= 5


def test_blanks_of_a_vocabulary_that_drops_the_first_stay() -> None:
    pieces = pieces_of(telling([0, 1, 1]).story(), decode_without_first_blank)
    assert [one.text for one in pieces] == ["Which", " letter", " letter"]


def test_time_stamps_stand_between_frames() -> None:
    token_ids = [0, *[1, 5, PAD, PAD] * 2, 0]
    pieces = pieces_of(telling(token_ids, [video(1, 2, 1, 2, stamp_tokens=2)]).story(), decode)
    assert [(one.kind, one.start, one.stop) for one in pieces] == [
        ("text", 0, 1),
        ("text", 1, 2),
        ("text", 2, 3),
        ("vision", 3, 5),
        ("text", 5, 6),
        ("text", 6, 7),
        ("vision", 7, 9),
        ("text", 9, 10),
    ]
    names = [one.text for one in pieces if one.kind == "vision"]
    assert names == ["video 1, frame 1", "video 1, frame 2"]


def test_frames_between_two_texts_are_named() -> None:
    """Frames 1 and 2 stand together, a stamp before frame 3."""
    item = video(1, 3, 1, 2) | {"ranges": [[1, 5], [6, 8]], "length": 7}
    pieces = pieces_of(telling([0, *[PAD] * 4, 1, PAD, PAD, 0], [item]).story(), decode)
    names = [one.text for one in pieces if one.kind == "vision"]
    assert names == ["video 1, frames 1–2", "video 1, frame 3"]


def test_neighbouring_items_are_told_apart() -> None:
    items = [image(1, num_tokens=2), image(3, num_tokens=3)]
    pieces = pieces_of(telling([0, *[PAD] * 5], items).story(), decode)
    assert pieces[1:] == [Piece("vision", 1, 3, "image 1"), Piece("vision", 3, 6, "image 2")]


@pytest.mark.parametrize("more", [0, 1, 777])
def test_a_long_text_has_a_gap(more: int) -> None:
    token_ids = [0] * (MOST_TEXT_TOKENS + more)
    pieces = pieces_of(telling(token_ids).story(), decode)
    gaps = [one for one in pieces if one.kind == "gap"]
    assert gaps == ([Piece("gap", FIRST_TEXT_TOKENS, FIRST_TEXT_TOKENS + more)] if more else [])
    assert len(pieces) == MOST_TEXT_TOKENS + len(gaps)


def test_items_inside_the_gap_are_part_of_it() -> None:
    before, behind = [0] * (FIRST_TEXT_TOKENS + 100), [0] * MOST_TEXT_TOKENS
    token_ids = [*before, *[PAD] * 6, *behind]
    pieces = pieces_of(telling(token_ids, [image(len(before), (1, 2, 3))]).story(), decode)
    (gap,) = [one for one in pieces if one.kind != "text"]
    shown_behind = MOST_TEXT_TOKENS - FIRST_TEXT_TOKENS
    assert gap == Piece("gap", FIRST_TEXT_TOKENS, len(token_ids) - shown_behind)


@pytest.mark.parametrize("has_ids", [True, False])
def test_without_words_there_are_counts(has_ids: bool) -> None:
    found = telling([0, 1, 5])
    story = found.story()
    if not has_ids:
        story.trace["prompt_token_ids"] = None
    pieces = pieces_of(story, None if has_ids else decode)
    assert pieces == [Piece("text", 0, 3, "[3 tokens of text]")]
