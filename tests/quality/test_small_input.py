"""The baselines that change the input: how many tokens are left, and which frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.quality import low_res, uniform
from vllm_budgetkv.testing.shapes import CELL_PIXELS, FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def video(shown: int, rows: int, columns: int) -> np.ndarray:
    """Each shown frame has a grey of its own."""
    size = (rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
    frames = np.stack([np.full(size, index % 256, dtype=np.uint8) for index in range(shown)])
    return np.repeat(frames, FRAMES_PER_TOKEN, axis=0)


def greys(frames: np.ndarray) -> list[int]:
    """Grey of each shown frame; its repeats must be alike."""
    shown = frames.reshape(-1, FRAMES_PER_TOKEN, *frames.shape[1:])
    assert (shown == shown[:, :1]).all()
    return shown[:, 0, 0, 0, 0].tolist()


@pytest.mark.parametrize("method", [uniform.thin, low_res.shrink])
def test_what_fits_stays_as_it_is(
    method: Callable[[Sequence[np.ndarray], int], list[np.ndarray]],
) -> None:
    clips = [video(6, 2, 2), video(2, 2, 2)]
    kept = method(clips, 32)
    assert all(one is other for one, other in zip(kept, clips, strict=True))


def test_uniform_keeps_the_middles_of_equal_stretches() -> None:
    (kept,) = uniform.thin([video(100, 2, 2)], 40)
    assert greys(kept) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


@pytest.mark.parametrize("room_tokens", [1, 7, 40, 199, 399])
def test_uniform_fits(room_tokens: int) -> None:
    kept = uniform.thin([video(100, 2, 2)], room_tokens)
    assert sum(map(uniform.video_tokens, kept)) <= max(4, room_tokens)


def test_uniform_shortens_every_video_alike() -> None:
    kept = uniform.thin([video(40, 2, 2), video(20, 2, 2), video(1, 2, 2)], 60)
    assert [len(greys(frames)) for frames in kept] == [9, 4, 1]


def test_every_video_keeps_a_frame() -> None:
    """Also where text alone exceeds the quota."""
    kept = uniform.thin([video(4, 2, 2)] * 5, -20)
    assert [len(greys(frames)) for frames in kept] == [1] * 5


@pytest.mark.parametrize(
    ("rows", "columns", "shown", "room_tokens", "shape"),
    [
        (4, 4, 10, 159, (10, 3, 3)),
        (4, 4, 10, 90, (10, 3, 3)),
        (4, 4, 10, 89, (10, 2, 2)),
        (4, 4, 10, 10, (10, 1, 1)),
        (4, 4, 10, 5, (5, 1, 1)),
        (4, 8, 10, 200, (10, 3, 6)),
        (2, 2, 500, 200, (200, 1, 1)),
        (1, 1, 10, 4, (4, 1, 1)),
    ],
)
def test_low_resolution_takes_the_largest_that_fits(
    rows: int, columns: int, shown: int, room_tokens: int, shape: tuple[int, int, int]
) -> None:
    (kept,) = low_res.shrink([video(shown, rows, columns)], room_tokens)
    num_frames, height, width, _ = kept.shape
    found = (num_frames // FRAMES_PER_TOKEN, height // CELL_PIXELS, width // CELL_PIXELS)
    assert found == shape
    assert uniform.video_tokens(kept) <= room_tokens


def test_low_resolution_keeps_the_picture() -> None:
    """Half black, half white: so is the small one."""
    wide = video(2, 2, 2)
    wide[:, :, CELL_PIXELS:] = 255
    (kept,) = low_res.shrink([wide], 2)
    assert kept.shape[1:3] == (CELL_PIXELS, CELL_PIXELS)
    assert kept[:, :, : CELL_PIXELS // 2 - 2].max() < 20
    assert kept[:, :, CELL_PIXELS // 2 + 2 :].min() > 235
