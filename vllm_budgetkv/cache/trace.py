"""How a request went, step by step: one JSON line when it ends, for `vllm-budgetkv inspect`.

Off unless asked for: it waits for the device after every step, and copies once which tokens the
heads hold. A line is bounded: 1,024 steps, as many compressions, a bit for each prompt token of
each head (and none beyond `MOST_KEPT_BITS`), and the prompt's token ids.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_budgetkv.arithmetic.frame_groups import whole_items
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.notices import reporting
from vllm_budgetkv.cache.report_file import append_line
from vllm_budgetkv.cache.vision import item_records

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.core.sched.output import NewRequestData

    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.tables import HeadTables

MOST_STEPS = 1024
MOST_KEPT_BITS = 2**27


@dataclass
class Trace:
    """The story of one request.

    Args:
        shape: layers and KV heads of this rank, (L, H).
        prompt_tokens: of its prompt (P).
        prompt_token_ids: None where the prompt came as embeddings.
        items: its pictures and videos, see `item_records`.
        steps: behind each step [seconds since it was admitted first, tokens seen, blocks held,
            head-pages that its heads hold].
        step_stride: steps that one entry of `steps` stands for: the last of them, with the most
            blocks and pages of any.
        classes: behind each step that compressed [tokens seen, compressions, is static [L, H]].
        class_stride: compressions that one entry of `classes` stands for, the last of them.
        held_tokens: [L, H] behind the prompt.
        kept: bool [L, H, P], positions of the prompt that each head holds behind it, as
            `packed_bits`; None if it was not reached or has too many bits.
        started_seconds: of the clock, when it was admitted first.
        num_steps, num_classes: how many were noted, whether they have an entry or share one.
        seen_compressions: of those that its slot has had, those that were noted.
    """

    shape: tuple[int, int]
    prompt_tokens: int
    prompt_token_ids: list[int] | None
    items: list[dict[str, Any]]
    steps: list[list[float]] = field(default_factory=list)
    step_stride: int = 1
    classes: list[list[Any]] = field(default_factory=list)
    class_stride: int = 1
    held_tokens: list[list[int]] = field(default_factory=list)
    kept: str | None = None
    started_seconds: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_classes: int = 0
    seen_compressions: int = 0

    def step(self, seen_tokens: int, blocks: int, pages: int) -> None:
        """Note what the request holds now."""
        seconds = round(time.perf_counter() - self.started_seconds, 4)
        if self.num_steps % self.step_stride:
            last = self.steps[-1]
            self.steps[-1] = [seconds, seen_tokens, max(last[2], blocks), max(last[3], pages)]
        else:
            self.steps.append([seconds, seen_tokens, blocks, pages])
        self.num_steps += 1
        if len(self.steps) > MOST_STEPS:
            pairs = zip(self.steps[::2], [*self.steps[1::2], self.steps[-1]], strict=True)
            self.steps = [[*b[:2], max(a[2], b[2]), max(a[3], b[3])] for a, b in pairs]
            self.step_stride *= 2

    def compressed(self, seen_tokens: int, compressions: int, is_static: list[list[bool]]) -> None:
        """Note the class of each head behind a compression, as a string of 0 and 1 (static)."""
        flags = "".join("01"[one] for row in is_static for one in row)
        entry = [seen_tokens, compressions, flags]
        if self.num_classes % self.class_stride:
            self.classes[-1] = entry
        else:
            self.classes.append(entry)
        self.num_classes += 1
        if len(self.classes) > MOST_STEPS:
            self.classes = [*self.classes[1::2], self.classes[-1]]
            self.class_stride *= 2

    def as_fields(self) -> dict[str, Any]:
        """What a line says of it. Nothing is copied: it may be long."""
        hidden = ("started_seconds", "seen_compressions")
        return {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in hidden
        }


@dataclass
class Traces:
    """The traces of unfinished client requests. Nothing here ever raises.

    Args:
        path: file to which the lines are appended.
        tables: page tables.
        by_id: by request id.
    """

    path: Path
    tables: HeadTables
    by_id: dict[str, Trace] = field(default_factory=dict, init=False)

    def open(self, new: NewRequestData) -> None:
        """A client's request arrived."""
        with reporting("a request cannot be traced: its line in --kv-trace-file is missing"):
            token_ids = new.prompt_token_ids
            self.by_id[new.req_id] = Trace(
                shape=(self.tables.num_layers, self.tables.num_heads),
                prompt_tokens=new.prompt_len,
                prompt_token_ids=None if token_ids is None else list(token_ids),
                items=item_records(whole_items(new.mm_features)),
            )

    def stepped(self, request: RequestState) -> None:
        """A step of a request ended. Waits for the device."""
        trace = self.by_id.get(request.request_id)
        if trace is None:
            return
        with reporting("what a step left cannot be traced: --kv-trace-file lacks it"):
            page_tokens = self.tables.pool.layout.page_tokens
            lens = self.tables.lens[request.slot]
            pages = int(((lens + page_tokens - 1) // page_tokens).sum())
            trace.step(request.computed_tokens, len(request.blocks), pages)
            if request.compressions > trace.seen_compressions:
                is_static = self.tables.is_static[request.slot].tolist()
                trace.compressed(request.computed_tokens, request.compressions, is_static)
                trace.seen_compressions = request.compressions

    def left(self, request: RequestState) -> None:
        """A request gave up its slot."""
        trace = self.by_id.get(request.request_id)
        if trace is not None:
            trace.step(request.computed_tokens, 0, 0)
            trace.seen_compressions = 0

    def prefilled(self, request: RequestState) -> None:
        """The prompt of a request is in the cache. Waits for the device."""
        trace = self.by_id.get(request.request_id)
        if trace is None:
            return
        with reporting("what requests keep cannot be traced: --kv-trace-file lacks it"):
            trace.held_tokens = self.tables.lens[request.slot].tolist()
            num_layers, num_heads = trace.shape
            if trace.prompt_tokens * num_layers * num_heads <= MOST_KEPT_BITS:
                trace.kept = packed_bits(kept_positions(request, self.tables).numpy())

    def close(self, request_id: str, record: dict[str, Any]) -> None:
        """A request ended; its line is written, with the fields of its record."""
        trace = self.by_id.pop(request_id, None)
        if trace is None:
            return
        with reporting(f"--kv-trace-file {self.path} cannot be written: requests go untraced"):
            line = json.dumps({"record": record, "trace": trace.as_fields()})
            append_line(self.path, line.encode() + b"\n")


def kept_positions(request: RequestState, tables: HeadTables) -> torch.Tensor:
    """bool [L, H, P] on the host: positions of the prompt that each head holds. Waits."""
    slot, prompt_tokens = request.slot, request.prompt_tokens
    lens = tables.lens[slot].cpu()
    num_pages = ceil_div(int(lens.max()), tables.pool.layout.page_tokens)
    pages = tables.page_table[slot, :, :, :num_pages].long()
    positions = tables.pool.positions[pages].flatten(2).cpu().long()
    is_held = torch.arange(positions.shape[-1]) < lens[..., None]
    # output behind the prompt, and what stands behind a head's tokens, goes to a place of no token
    places = positions.where(is_held & (positions < prompt_tokens), prompt_tokens)
    kept = torch.zeros(*lens.shape, prompt_tokens + 1, dtype=torch.bool)
    return kept.scatter_(-1, places, True)[..., :prompt_tokens]


def packed_bits(flags: np.ndarray) -> str:
    """Bits of a bool array, deflated, as base64."""
    return base64.b64encode(zlib.compress(np.packbits(flags).tobytes())).decode()


def unpacked_bits(packed: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bool array of `packed_bits`.

    Raises:
        ValueError: it holds fewer bits than `shape`, or is no such string.
    """
    try:
        raw = zlib.decompress(base64.b64decode(packed))
    except zlib.error as error:
        raise ValueError(f"bits that cannot be read: {error}") from error
    size = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=size)
    if len(raw) != ceil_div(size, 8):
        raise ValueError(f"{len(raw)} bytes are not the {ceil_div(size, 8)} of {shape}")
    return bits.astype(bool).reshape(shape)
