"""A lab that makes the input fit the quota instead of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.quality import low_res, uniform
from benchmarks.quality.lab import MAX_ANSWER_TOKENS, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.quality.lab import Setup
    from benchmarks.quality.suite import Example

METHODS: dict[str, Callable[..., list[Any]]] = {"uniform": uniform.thin, "low-res": low_res.shrink}
VIDEO_PAD = "<|video_pad|>"


class SmallInputLab(Lab):
    """Asks with fewer or smaller frames; text stays whole, and what it leaves is for the frames.

    Args:
        setup: one engine; its quota in tokens is what prompt and answer must fit.
        method: a key of `METHODS`.
    """

    def __init__(self, setup: Setup, method: str) -> None:
        super().__init__(setup)
        self._fit = METHODS[method]

    def _prompt(self, example: Example) -> Any:
        prompt = super()._prompt(example)
        videos = prompt["multi_modal_data"]["video"]
        text_tokens = len(self._processor.tokenizer(prompt["prompt"])["input_ids"])
        text_tokens -= prompt["prompt"].count(VIDEO_PAD)
        room_tokens = self.setup.budget["quota_tokens"] - text_tokens - MAX_ANSWER_TOKENS
        fitted = self._fit([frames for frames, _ in videos], room_tokens)
        prompt["multi_modal_data"]["video"] = [
            (
                frames,
                about
                | {"total_num_frames": len(frames), "frames_indices": list(range(len(frames)))},
            )
            for frames, (_, about) in zip(fitted, videos, strict=True)
        ]
        return prompt
