"""Baseline: smaller frames, so that the prompt fits the quota uncompressed.

The comparison of "Reducing Peak Memory Usage for Modern MLLM Pipelines" (arXiv 2604.16734), where
a needle in images falls from 80.31 to 9.38 when the input is made smaller instead of the cache.
`CELL_PIXELS` squared, one token a frame, is the least; a video that is too long even so loses
frames too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.quality import uniform
from vllm_budgetkv.testing.shapes import CELL_PIXELS, FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence


def shrink(videos: Sequence[np.ndarray], room_tokens: int) -> list[np.ndarray]:
    """Videos of at most `room_tokens` tokens in all, at the highest resolution that fits.

    Args:
        videos: uint8 [frames, height, width, 3], sides multiples of `CELL_PIXELS`; each shown
            frame comes `FRAMES_PER_TOKEN` times.
        room_tokens: vision tokens that the quota leaves. A video keeps at least one token.
    """
    if sum(map(uniform.video_tokens, videos)) <= room_tokens:
        return list(videos)
    longest = max(max(video.shape[1:3]) for video in videos) // CELL_PIXELS
    for cells in range(max(1, longest - 1), 0, -1):
        sizes = [_size(video, cells / longest) for video in videos]
        tokens = [
            len(video) // FRAMES_PER_TOKEN * rows * columns
            for video, (rows, columns) in zip(videos, sizes, strict=True)
        ]
        if sum(tokens) <= room_tokens or cells == 1:
            break
    small = [_resize(video, size) for video, size in zip(videos, sizes, strict=True)]
    return uniform.thin(small, room_tokens)


def _size(video: np.ndarray, share: float) -> tuple[int, int]:
    """(rows, columns) of cells of a frame at a share of its sides."""
    rows, columns = video.shape[1] // CELL_PIXELS, video.shape[2] // CELL_PIXELS
    return max(1, int(rows * share + 1e-9)), max(1, int(columns * share + 1e-9))


def _resize(video: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic, as Qwen's own processor resizes."""
    width, height = size[1] * CELL_PIXELS, size[0] * CELL_PIXELS
    shown = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in video[::FRAMES_PER_TOKEN]
    ]
    return np.repeat(np.stack(shown), FRAMES_PER_TOKEN, axis=0)
