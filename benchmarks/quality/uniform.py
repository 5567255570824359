"""Baseline: fewer frames, evenly spaced, so that the prompt fits the quota uncompressed.

What every serving stack does with a video that is too long (`num_frames` of vLLM, `nframes` of
Qwen's own processor). The frames that stay follow one another at the frame rate that the model
knows, as if nothing had been between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_budgetkv.testing.shapes import CELL_PIXELS, FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence


def frame_tokens(video: np.ndarray) -> int:
    """Vision tokens of one shown frame of a video, uint8 [frames, height, width, 3]."""
    return (video.shape[1] // CELL_PIXELS) * (video.shape[2] // CELL_PIXELS)


def video_tokens(video: np.ndarray) -> int:
    """Vision tokens of a video; `FRAMES_PER_TOKEN` frames are one shown frame."""
    return len(video) // FRAMES_PER_TOKEN * frame_tokens(video)


def thin(videos: Sequence[np.ndarray], room_tokens: int) -> list[np.ndarray]:
    """Videos of at most `room_tokens` tokens in all, each shortened by about the same share.

    Args:
        videos: uint8 [frames, height, width, 3]; each shown frame comes `FRAMES_PER_TOKEN` times.
        room_tokens: vision tokens that the quota leaves. A video keeps at least one shown frame,
            so many short videos may need more.
    """
    total_tokens = sum(map(video_tokens, videos))
    if total_tokens <= room_tokens:
        return list(videos)
    share = max(0, room_tokens) / total_tokens
    return [_evenly(video, share) for video in videos]


def _evenly(video: np.ndarray, share: float) -> np.ndarray:
    shown = len(video) // FRAMES_PER_TOKEN
    kept = max(1, int(shown * share))
    # the middle of each of `kept` equal stretches
    places = ((np.arange(kept) + 0.5) * shown / kept).astype(np.int64)
    return np.repeat(video[places * FRAMES_PER_TOKEN], FRAMES_PER_TOKEN, axis=0)
