"""Pictures whose tokens attend to each other both ways, as in Gemma 3: which tokens, and where a
chunk may end.

Such a token sees all of its picture, so a chunk holds all of it or what follows its last token: a
chunk that would end inside of it ends in front of it, or, where it begins there, behind it. No
chunk grows by that beyond the longest, as long as no picture is longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# first position, and the one behind the last
Range = tuple[int, int]


def whole_stop(start_tokens: int, stop_tokens: int, pictures: Sequence[Range]) -> int:
    """Where a chunk behind `start_tokens` ends that may cut no picture; further than that, always.

    Args:
        start_tokens: in front of the chunk.
        stop_tokens: where it would end otherwise.
        pictures: of the prompt, in order, without overlap.
    """
    for first, stop in pictures:
        if first < stop_tokens < stop:
            return first if first > start_tokens else stop
    return stop_tokens


def whole_tokens(start_tokens: int, num_tokens: int, pictures: Sequence[Range]) -> int:
    """Tokens of a chunk that cuts no picture and is no longer than asked; 0 if there is none."""
    stop_tokens = whole_stop(start_tokens, start_tokens + num_tokens, pictures)
    count = stop_tokens - start_tokens
    return count if count <= num_tokens else 0


def tokens_ahead(start_tokens: int, num_tokens: int, pictures: Sequence[Range]) -> list[int]:
    """Of each token of a chunk, how many of its picture stand behind it.

    Args:
        start_tokens: in front of the chunk.
        num_tokens: of the chunk.
        pictures: of the prompt.

    Raises:
        ValueError: the chunk ends inside of a picture; names both.
    """
    ahead = [0] * num_tokens
    end_tokens = start_tokens + num_tokens
    for first, stop in pictures:
        if first < end_tokens < stop:
            raise ValueError(
                f"tokens {start_tokens} to {end_tokens} end inside of the picture of tokens "
                f"{first} to {stop}"
            )
        for position in range(max(first, start_tokens), min(stop, end_tokens)):
            ahead[position - start_tokens] = stop - 1 - position
    return ahead
