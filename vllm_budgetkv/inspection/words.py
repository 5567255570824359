"""The prompt as it is read: pieces of text, each with the positions of its tokens, and items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_budgetkv.inspection.story import Item, Story

# text tokens that a page shows at most, and how many of them from the beginning
MOST_TEXT_TOKENS = 2000
FIRST_TEXT_TOKENS = 500
# of one character: the longest in UTF-8, and one for what a vocabulary puts in front
MOST_PIECE_TOKENS = 5
BROKEN = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """What some neighbouring positions of the prompt are.

    Args:
        kind: "text", "vision" or "gap", which is what is not shown.
        start, stop: positions, from the first to before the last.
        text: of a text piece; the name of a vision item.
    """

    kind: str
    start: int
    stop: int
    text: str = ""


def pieces_of(story: Story, decode: Callable[[list[int]], str] | None) -> list[Piece]:
    """The prompt in order, shortened where it is long.

    Args:
        story: of the request.
        decode: text of token ids; None where it is not known, so that text stands as positions.
    """
    found: list[Piece] = []
    shown = _shown(story.is_vision)
    for start, stop, kind in _runs(story.is_vision, shown):
        if kind == "text":
            found += _text_pieces(story.trace["prompt_token_ids"], start, stop, decode)
        elif kind == "vision":
            found += _vision_pieces(story.items, start, stop)
        else:
            found.append(Piece("gap", start, stop))
    return found


def _shown(is_vision: np.ndarray) -> np.ndarray:
    """bool [P]: False from the first to the last position of what is left out."""
    text = np.flatnonzero(~is_vision)
    shown = np.ones(is_vision.size, dtype=bool)
    if text.size > MOST_TEXT_TOKENS:
        first = text[FIRST_TEXT_TOKENS - 1] + 1
        last = text[text.size - (MOST_TEXT_TOKENS - FIRST_TEXT_TOKENS)]
        shown[first:last] = False
    return shown


def _runs(is_vision: np.ndarray, shown: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """Neighbouring positions of one kind."""
    kinds = np.where(shown, is_vision.astype(int), 2)
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), kinds.size]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if start < stop:
            yield start, stop, ("text", "vision", "gap")[kinds[start]]


def _vision_pieces(items: Sequence[Item], start: int, stop: int) -> Iterator[Piece]:
    """One for each item that has a part there."""
    for item in items:
        inside = item.positions[(item.positions >= start) & (item.positions < stop)]
        if inside.size:
            name = _name_of_part(item, inside)
            yield Piece("vision", int(inside[0]), int(inside[-1]) + 1, name)


def _name_of_part(item: Item, inside: np.ndarray) -> str:
    """Name of the item, and which of its frames some of its positions are."""
    if item.num_frames < 2 or inside.size == item.positions.size:
        return item.name
    places = np.searchsorted(item.positions, inside[[0, -1]])
    first, last = (np.searchsorted(item.frame_ends, places, side="right") + 1).tolist()
    return f"{item.name}, frame {first}" if first == last else f"{item.name}, frames {first}–{last}"


def _text_pieces(
    token_ids: list[int] | None,
    start: int,
    stop: int,
    decode: Callable[[list[int]], str] | None,
) -> list[Piece]:
    if token_ids is None or decode is None:
        return [Piece("text", start, stop, f"[{stop - start:,} tokens of text]")]
    found: list[Piece] = []
    before, first = start, start
    for end in range(start + 1, stop + 1):
        # in the context of the piece before: some vocabularies drop a leading blank
        context = decode(token_ids[before:first]) if before < first else ""
        text = decode(token_ids[before:end])[len(context) :]
        is_whole = not text.endswith(BROKEN) or end - first >= MOST_PIECE_TOKENS or end == stop
        if is_whole:
            found.append(Piece("text", first, end, text))
            before, first = first, end
    return found
