"""The numbers of a story: those of the record, per head, and nothing that is measured twice."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_budgetkv.inspection.story import Story

RECORDED = (
    "request_id", "policy", "prompt_tokens", "output_tokens", "peak_blocks", "full_cache_blocks",
    "kv_bytes", "compressions", "compression_seconds", "preemptions", "recall", "reused_tokens",
)  # fmt: skip


def numbers_of(story: Story) -> dict[str, Any]:
    """What the page says in digits, by name, and holds for scripts."""
    record = story.record
    return {
        **{name: record[name] for name in RECORDED},
        "quota_blocks": record["quota_blocks"] if story.has_quota else None,
        "block_tokens": record["block_tokens"],
        "full_cache_bytes": record["full_cache_blocks"] * record["block_bytes"],
        "text_tokens": int((~story.is_vision).sum()),
        "vision_tokens": int(story.is_vision.sum()),
        "heads": {one.name: one.num_heads for one in story.classes},
        "kept_tokens_per_head": {
            one.name: {
                kind: round(tokens / one.num_heads, 1)
                for kind, tokens in record["kept"][one.name].items()
            }
            for one in story.classes
        },
        "heads_that_changed": int((story.class_changes > 0).sum()),
        "prompt_seconds": story.prompt_seconds if isfinite(story.prompt_seconds) else None,
        "total_seconds": float(story.steps[-1, 0]) if len(story.steps) else None,
    }
