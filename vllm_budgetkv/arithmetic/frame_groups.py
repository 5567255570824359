"""A long video in groups of frames: how many each has, and what the encoder then takes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# a group has as many whole frames as fit, and one if none does
GROUP_TOKENS = 256

# of frames that a chunk begins or ends inside; larger ones make it shorter
CUT_FRAMES_TOKENS = 2048


def group_stops(num_frames: int, frame_tokens: int, group_tokens: int = GROUP_TOKENS) -> list[int]:
    """Behind which frame each group of a video ends.

    Args:
        num_frames: of the video, 1 or more.
        frame_tokens: embeddings of each frame.
        group_tokens: most embeddings of a group of several frames.
    """
    step = max(1, group_tokens // frame_tokens)
    return [*range(step, num_frames, step), num_frames]


def bounded_encoder_tokens(batch_tokens: int, item_tokens: int) -> int:
    """Embeddings that the encoder makes in a step and keeps, whatever the length of a video.

    Args:
        batch_tokens: most tokens of a step: the largest chunk.
        item_tokens: of the largest picture or other item that stays whole.
    """
    return max(item_tokens, batch_tokens + CUT_FRAMES_TOKENS)


def whole_items(features: Iterable[Any]) -> list[Any]:
    """The items of a prompt as they were before their videos were cut into groups.

    Args:
        features: vLLM's `MultiModalFeatureSpec` of each item. The first group of a video has it
            whole, without its pixels, as `whole`; the others have None there.
    """
    found = (getattr(feature, "whole", feature) for feature in features)
    return [feature for feature in found if feature is not None]
