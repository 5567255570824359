"""Stories of requests that never ran, whose every number is known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_budgetkv.cache.trace import packed_bits
from vllm_budgetkv.inspection.story import Story

PAGE_TOKENS = 16


def video(
    offset: int, frames: int, rows: int, columns: int, stamp_tokens: int = 0
) -> dict[str, Any]:
    """A video, with the text of a time stamp in front of each frame if there are `stamp_tokens`."""
    size = rows * columns
    step = stamp_tokens + size
    starts = [offset + step * frame + stamp_tokens for frame in range(frames)]
    ranges = [[start, start + size] for start in starts]
    if not stamp_tokens:
        ranges = [[offset, offset + frames * size]]
    return {
        "modality": "video",
        "offset": offset,
        "length": step * frames,
        "ranges": ranges,
        "runs": [[frames, rows, columns]],
    }


def image(offset: int, *runs: tuple[int, int, int], num_tokens: int = 0) -> dict[str, Any]:
    """A picture: frames of it, or `num_tokens` that stand nobody knows how."""
    length = num_tokens or sum(frames * rows * columns for frames, rows, columns in runs)
    return {
        "modality": "image",
        "offset": offset,
        "length": length,
        "ranges": [[offset, offset + length]],
        "runs": [list(run) for run in runs],
    }


@dataclass
class Telling:
    """What a story shall say.

    Args:
        kept: bool [L, H, P].
        is_static: bool [L, H] behind the prompt.
        items: pictures and videos.
        history: bool [compressions, L, H]; by default the same classes twice.
        token_ids: of the prompt; by default their positions.
    """

    kept: np.ndarray
    is_static: np.ndarray
    items: list[dict[str, Any]] = field(default_factory=list)
    history: np.ndarray | None = None
    token_ids: list[int] | None = None
    policy: str = "hybrid"
    quota_blocks: int = 8
    pages_per_block: int = 1

    @property
    def block_tokens(self) -> int:
        return self.pages_per_block * PAGE_TOKENS

    @property
    def prompt_tokens(self) -> int:
        return self.kept.shape[-1]

    def is_vision(self) -> np.ndarray:
        flags = np.zeros(self.prompt_tokens, dtype=bool)
        for item in self.items:
            for start, stop in item["ranges"]:
                flags[start:stop] = True
        return flags

    def record(self) -> dict[str, Any]:
        classes = {"static": self.is_static, "dynamic": ~self.is_static}
        counts = {name: self.kept[chosen].sum(0) for name, chosen in classes.items()}
        of_vision = self.is_vision()
        return {
            "request_id": "chatcmpl-1",
            "policy": self.policy,
            "quota_blocks": self.quota_blocks,
            "page_tokens": PAGE_TOKENS,
            "block_tokens": self.block_tokens,
            "prompt_tokens": self.prompt_tokens,
            "block_bytes": 4096,
            "output_tokens": 3,
            "peak_blocks": self.quota_blocks,
            "full_cache_blocks": -(-(self.prompt_tokens + 2) // self.block_tokens),
            "kv_bytes": 4096 * self.quota_blocks + 100,
            "compressions": 2,
            "compression_seconds": 0.25,
            "preemptions": 0,
            "recall": "off",
            "reused_tokens": 0,
            "kept": {
                name: {
                    "text": int(found[~of_vision].sum()),
                    "vision": int(found[of_vision].sum()),
                }
                for name, found in counts.items()
            },
            "kept_counts": {name: found.tolist() for name, found in counts.items()},
            "heads": {name: int(chosen.sum()) for name, chosen in classes.items()},
            "static_heads": self.is_static.tolist(),
        }

    def trace(self) -> dict[str, Any]:
        history = self.history
        if history is None:
            history = np.stack((self.is_static, self.is_static))
        num_steps = 10
        seen = np.linspace(PAGE_TOKENS, self.prompt_tokens, num_steps).astype(int).tolist()
        pages = int(self.is_static.size * self.quota_blocks * self.pages_per_block * 0.75)
        steps = [[0.1 * (n + 1), one, self.quota_blocks, pages] for n, one in enumerate(seen)]
        steps += [[1.1, self.prompt_tokens + 1, self.quota_blocks, pages + 1]]
        steps += [[1.2, self.prompt_tokens + 1, 0, 0]]
        return {
            "shape": list(self.is_static.shape),
            "prompt_tokens": self.prompt_tokens,
            "prompt_token_ids": self.token_ids or list(range(self.prompt_tokens)),
            "items": self.items,
            "steps": steps,
            "step_stride": 1,
            "classes": [
                [64 * (n + 1), n + 1, "".join(map(str, flags.flatten().astype(int)))]
                for n, flags in enumerate(history)
            ],
            "class_stride": 1,
            "held_tokens": self.kept.sum(-1).tolist(),
            "kept": packed_bits(self.kept),
        }

    def line(self) -> str:
        return json.dumps({"record": self.record(), "trace": self.trace()})

    def story(self) -> Story:
        return Story.of_line(self.line())


def long_telling() -> Telling:
    """36 layers of 8 heads, half an hour of video with time stamps, 12,000 tokens of text."""
    rng = np.random.default_rng(0)
    items = [video(40, 400, 5, 8, stamp_tokens=8), image(19_300, (1, 20, 30))]
    prompt_tokens = 32_000
    shape = (36, 8)
    is_static = rng.random(shape) < 0.4
    chance = np.where(is_static, 0.05, 0.12)[..., None]
    centre = np.exp(-((np.arange(prompt_tokens) - 9000) ** 2) / 2e6) * 0.5
    kept = rng.random((*shape, prompt_tokens)) < chance + centre
    kept[..., -200:] = True
    history = is_static ^ (rng.random((31, *shape)) < 0.06)
    history[-1] = is_static
    telling = Telling(kept, is_static, items, history, quota_blocks=256)
    telling.token_ids = (np.arange(prompt_tokens) % 1000).tolist()
    return telling
