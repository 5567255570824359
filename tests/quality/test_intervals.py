"""Intervals against published values and against counting by hand."""

from __future__ import annotations

import pytest

from benchmarks.quality.intervals import mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_of_newcombe(right: int, count: int, low: float, high: float) -> None:
    """Table I of Newcombe, "Two-sided confidence intervals for the single proportion", 1998."""
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric() -> None:
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("right", "count"), [(-1, 4), (5, 4), (0, 0)])
def test_wilson_refuses(right: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{right} right of {count}"):
        wilson(right, count)


def marks(text: str) -> list[bool]:
    return [mark == "1" for mark in text]


@pytest.mark.parametrize(
    ("one", "other", "probability"),
    [
        ("1100", "1100", 1.0),
        # five coins that all fall alike: 2 / 32
        ("11111", "00000", 0.0625),
        # six differ, one the other way: 2 * (1 + 6) / 64
        ("1111100", "0000010", 0.21875),
        # equal parts: more than all there is
        ("10", "01", 1.0),
    ],
)
def test_mcnemar(one: str, other: str, probability: float) -> None:
    assert mcnemar(marks(one), marks(other)) == probability
    assert mcnemar(marks(other), marks(one)) == probability


def test_mcnemar_pairs_examples() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        mcnemar([True], [True, False])
