"""Ranges that a request pins: what may be written, and how many stand where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_budgetkv.arithmetic.pinned import MOST_RANGES, Pinned

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=6)


@given(RANGES, st.integers(0, 100))
def test_they_are_the_positions_that_were_written(
    ranges: list[tuple[int, int]], position: int
) -> None:
    """Apart and ascending, however they were written."""
    pinned = Pinned.parse(",".join(f"{start}:{start + length}" for start, length in ranges))
    expected = {place for start, length in ranges for place in range(start, start + length)}
    found = [place for start, stop in pinned.ranges for place in range(start, stop)]
    assert found == sorted(expected)
    assert pinned.num_tokens == len(expected)
    assert pinned.stop == max(expected) + 1
    assert pinned.count_before(position) == sum(place < position for place in expected)
    assert all(a[1] < b[0] for a, b in zip(pinned.ranges, pinned.ranges[1:], strict=False))


@pytest.mark.parametrize(
    "text",
    ["", ":", "3", "3:", ":3", "-1:4", "4:4", "5:4", "0:4;5:6", "a:b", "0:4,", "1.0:2", "٣:٤",
     "0:99999999999"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ranges of positions|empty range"):
        Pinned.parse(text)


def test_there_are_not_too_many() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_RANGES}"):
        Pinned.parse(",".join(f"{2 * i}:{2 * i + 1}" for i in range(MOST_RANGES + 1)))


def test_none_is_nothing() -> None:
    assert (Pinned().num_tokens, Pinned().stop, Pinned().count_before(9)) == (0, 0, 0)
