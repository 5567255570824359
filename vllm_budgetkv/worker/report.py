"""What happened to each request: one JSON line when it ends. The proof that compression ran."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_budgetkv.worker.requests import RequestState
    from vllm_budgetkv.worker.tables import HeadTables

CLASSES = ("static", "dynamic")


@dataclass
class RequestRecord:
    """Counters of one request.

    Args:
        peak_blocks: most blocks held at any instant.
        block_bytes: bytes of a block, all layers and heads of this rank.
        kept: tokens after prefill, summed over (layer, head), by class and modality.
        kept_counts: per prompt position, the (layer, head) pairs of a class that kept it.
        heads: (layer, head) pairs of each class after prefill.
        static_heads: after prefill, per layer and head whether the head is static.
        kv_bytes: bytes of blocks, tables and probe bank at the peak.
        compression_seconds: of the host; on a GPU the time that launching takes.
    """

    request_id: str
    policy: str
    quota_blocks: int
    page_tokens: int
    prompt_tokens: int
    block_bytes: int
    output_tokens: int = 0
    peak_blocks: int = 0
    full_cache_blocks: int = 0
    kv_bytes: int = 0
    compressions: int = 0
    compression_seconds: float = 0.0
    preemptions: int = 0
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    kept_counts: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    static_heads: list[list[bool]] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)

    def observe(self, num_blocks: int, extra_bytes: int) -> None:
        """Note what the request holds at this instant."""
        self.peak_blocks = max(self.peak_blocks, num_blocks)
        self.kv_bytes = max(self.kv_bytes, num_blocks * self.block_bytes + extra_bytes)

    def leave(self, seen_tokens: int) -> None:
        """Note how long the request is when it gives up its slot."""
        # the last sampled token was never computed
        self.output_tokens = max(0, seen_tokens + 1 - self.prompt_tokens)
        self.full_cache_blocks = -(-seen_tokens // self.page_tokens)

    def append_to(self, path: Path) -> None:
        """Write the record as one line of JSON behind the file's others."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def record_kept(request: RequestState, tables: HeadTables) -> None:
    """Count what each class of head holds after prefill. Reads the device; only for reports."""
    record, slot = request.record, request.slot
    page_tokens = tables.pool.layout.page_tokens
    # the prompt, unless a request that nothing compresses computed output with its end
    length = request.computed_tokens
    record.static_heads = tables.is_static[slot].tolist()
    for index, name in enumerate(CLASSES):
        counts = torch.zeros(length, dtype=torch.int64)
        chosen = tables.is_static[slot] if index == 0 else ~tables.is_static[slot]
        for layer, head in chosen.nonzero().tolist():
            held = int(tables.lens[slot, layer, head])
            pages = tables.page_table[slot, layer, head, : -(-held // page_tokens)].long()
            positions = tables.pool.positions[pages].flatten()[:held].long().cpu()
            counts.index_add_(0, positions, torch.ones_like(positions))
        is_vision = request.spans.lookup(torch.arange(length, dtype=torch.int32))[1]
        record.kept[name] = {
            "text": int(counts[~is_vision].sum()),
            "vision": int(counts[is_vision].sum()),
        }
        record.kept_counts[name] = counts.tolist()
        record.heads[name] = int(chosen.sum())
