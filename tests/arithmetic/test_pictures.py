"""Chunks that cut no picture whose tokens attend to each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_budgetkv.arithmetic.pictures import tokens_ahead, whole_stop, whole_tokens

PICTURES = [(4, 9), (9, 20), (30, 31)]
CHUNK_TOKENS = 12


@pytest.mark.parametrize(
    ("start", "stop", "whole"),
    [
        (0, 4, 4),
        (0, 6, 4),
        (4, 6, 9),
        (5, 8, 9),
        (0, 9, 9),
        (0, 12, 9),
        (9, 12, 20),
        (12, 15, 20),
        (0, 20, 20),
        (20, 30, 30),
        (29, 30, 30),
        (21, 40, 40),
    ],
)
def test_a_chunk_ends_in_front_of_a_picture_or_behind_it(start: int, stop: int, whole: int) -> None:
    assert whole_stop(start, stop, PICTURES) == whole


@pytest.mark.parametrize(("start", "asked", "given"), [(0, 6, 4), (4, 4, 0), (4, 5, 5), (9, 3, 0)])
def test_a_step_without_room_for_a_picture_computes_none_of_it(
    start: int, asked: int, given: int
) -> None:
    assert whole_tokens(start, asked, PICTURES) == given


def test_tokens_of_a_picture_see_its_last() -> None:
    assert tokens_ahead(0, 4, PICTURES) == [0] * 4
    assert tokens_ahead(2, 8 + 10, PICTURES) == [0, 0, *range(4, -1, -1), *range(10, -1, -1)]
    # what a cached prefix holds of a picture is seen in any case
    assert tokens_ahead(6, 3, PICTURES) == [2, 1, 0]
    assert tokens_ahead(25, 10, PICTURES) == [0] * 10


@pytest.mark.parametrize(("start", "count"), [(0, 5), (5, 3), (9, 10)])
def test_a_chunk_that_cuts_a_picture_is_no_chunk(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="end inside of the picture of tokens"):
        tokens_ahead(start, count, PICTURES)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Tokens of a prompt, and pictures in it that a chunk holds."""
    pictures, end = [], 0
    parts = st.tuples(st.integers(0, 7), st.integers(1, CHUNK_TOKENS))
    for gap, length in draw(st.lists(parts, max_size=8)):
        pictures.append((end + gap, end + gap + length))
        end += gap + length
    return end + draw(st.integers(0, 9)), pictures


@given(prompts())
def test_a_prompt_in_chunks(prompt: tuple[int, list[tuple[int, int]]]) -> None:
    """Every chunk has tokens, none too many, and every token of a picture sees all of it."""
    num_tokens, pictures = prompt
    start, ahead = 0, []
    while start < num_tokens:
        natural = min(start + CHUNK_TOKENS - start % CHUNK_TOKENS, num_tokens)
        stop = whole_stop(start, natural, pictures)
        assert start < stop <= start + CHUNK_TOKENS
        ahead += tokens_ahead(start, stop - start, pictures)
        start = stop
    for position, seen in enumerate(ahead):
        inside = [stop for first, stop in pictures if first <= position < stop]
        assert position + seen == (inside[0] - 1 if inside else position)
