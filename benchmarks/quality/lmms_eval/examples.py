"""What lmms-eval calls for a document of `write_data`; named in `template.yaml`."""

from __future__ import annotations

from typing import Any

from PIL import Image

from benchmarks.quality.lab import same_answer
from vllm_budgetkv.testing.shapes import FRAMES_PER_TOKEN


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """Chat messages of lmms-eval; a video is the list of its frames, which is not sampled again."""
    return [
        {"role": message["role"], "content": [_part(part) for part in message["content"]]}
        for message in doc["messages"]
    ]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The last question, for logs and cache keys; the model is asked with `doc_to_messages`."""
    return "".join(part["text"] or "" for part in doc["messages"][-1]["content"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer is the right one, to the letter."""
    return {"right": float(same_answer(results[0], doc["answer"]))}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["strip"] is None:
        return {"type": "text", "text": part["text"]}
    return {"type": "video", "url": frames_of(part["strip"], part["frames"])}


def frames_of(strip: str, num_frames: int) -> list[Image.Image]:
    """Frames of a film strip, each `FRAMES_PER_TOKEN` times."""
    with Image.open(strip) as image:
        image.load()
    height = image.height // num_frames
    boxes = [(0, top, image.width, top + height) for top in range(0, image.height, height)]
    return [frame for box in boxes for frame in [image.crop(box)] * FRAMES_PER_TOKEN]
