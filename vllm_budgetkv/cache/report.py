"""What happened to each request: one JSON line when it ends. The proof that compression ran."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_budgetkv.arithmetic.frame_groups import whole_items
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.arithmetic.recalled import Recalled
from vllm_budgetkv.cache.notices import warn_once
from vllm_budgetkv.cache.report_file import append_line
from vllm_budgetkv.cache.summary import CLASSES, Summary
from vllm_budgetkv.cache.vision import frame_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    from vllm.v1.core.sched.output import NewRequestData

    from vllm_budgetkv.arithmetic.terms import Terms
    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.tables import HeadTables
    from vllm_budgetkv.cache.trace import Traces


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
        recall: "off" without host memory; "not needed" for a prompt inside the quota; "index too
            large" or "no room" where it was served without; "not reached" if it ended before; "on".
        recall_entry_tokens: tokens that an entry of its index speaks for; 0 without one.
        host_bytes: of host memory that keep its prompt.
        reused_tokens: of the prompt, that host memory had, so that the model did not compute them.
        recall_steps: decode steps in which heads brought tokens back.
        recalled_tokens: that they read in these steps, summed over (layer, head).
        moved_tokens: of these, those that were not on the device yet.
        moved_bytes: that were copied for it.
    """

    request_id: str
    policy: str
    quota_blocks: int
    page_tokens: int
    block_tokens: int
    prompt_tokens: int
    block_bytes: int
    output_tokens: int = 0
    peak_blocks: int = 0
    full_cache_blocks: int = 0
    kv_bytes: int = 0
    compressions: int = 0
    compression_seconds: float = 0.0
    preemptions: int = 0
    recall: str = "off"
    recall_entry_tokens: int = 0
    host_bytes: int = 0
    reused_tokens: int = 0
    recall_steps: int = 0
    recalled_tokens: int = 0
    moved_tokens: int = 0
    moved_bytes: int = 0
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    kept_counts: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    static_heads: list[list[bool]] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)

    def append_to(self, path: Path) -> None:
        """Write the record as one line of JSON behind the file's others; never raises."""
        try:
            append_line(path, json.dumps(asdict(self)).encode() + b"\n")
        except Exception:  # noqa: BLE001
            # what only reports does not end a request
            warn_once(f"--kv-report-file {path} cannot be written: requests go unreported")


@dataclass(frozen=True)
class Leaving:
    """What a request brought back since its prompt was read, counted on the device.

    Args:
        steps: in which its heads looked for tokens.
        recalled_tokens: int64 scalar, tokens that stand ready in a step, over its heads.
        moved_tokens: int64 scalar, tokens that were fetched in all steps.
        token_bytes: of a token's key and value.
    """

    steps: int
    recalled_tokens: torch.Tensor
    moved_tokens: torch.Tensor
    token_bytes: int

    @classmethod
    def of(cls, request: RequestState, recaller: Recaller) -> Self:
        """Of a request that gives up its slot, whose counts go with it."""
        slot, quota = request.slot, request.quota
        # the first that looked for tokens: one of the answer, or the prompt's last
        first = quota.chunks_end(request.prompt_tokens)
        return cls(
            steps=request.computed_tokens - first,
            recalled_tokens=recaller.num_recalled[slot].sum(),
            moved_tokens=recaller.moved[slot].sum(),
            token_bytes=recaller.token_bytes,
        )

    def read(self) -> Recalled:
        """The numbers. Waits for the device."""
        moved_tokens = int(self.moved_tokens)
        return Recalled(
            steps=self.steps,
            tokens=self.steps * int(self.recalled_tokens),
            moved_tokens=moved_tokens,
            moved_bytes=moved_tokens * self.token_bytes,
        )


class Counted(NamedTuple):
    """What is told of requests since the last time.

    Attributes:
        summaries: of prompts that have been read, by request id.
        left: of requests that gave up their slots, what they brought back.
    """

    summaries: dict[str, Summary]
    left: list[Leaving]

    @property
    def recalled(self) -> Recalled | None:
        """The sum of what they brought back; None if none did. Waits for the device."""
        if not self.left:
            return None
        total = Recalled()
        for one in self.left:
            total.add(one.read())
        return total


@dataclass
class Reports:
    """The records of unfinished client requests. Every number of a record is written here.

    Args:
        block_bytes: bytes of a block of this rank.
        tables: page tables.
        on_finished: gets the record of every client request that ended; None if nobody reads them.
        recaller: brings tokens back; None without host memory.
        summarizes: whether it is counted what requests keep of their prompts.
        traces: the story of every client request; None if nobody reads it.
        records: by request id.
        summaries: of prompts that have been read since somebody took them, by request id.
        leaving: requests that gave up their slots since then and had brought tokens back.
        is_paused: whether new requests are no client's, as while the worker warms up.
    """

    block_bytes: int
    tables: HeadTables
    on_finished: Callable[[RequestRecord], None] | None
    recaller: Recaller | None = None
    summarizes: bool = False
    traces: Traces | None = None
    records: dict[str, RequestRecord] = field(default_factory=dict, init=False)
    summaries: dict[str, Summary] = field(default_factory=dict, init=False)
    leaving: list[Leaving] = field(default_factory=list, init=False)
    is_paused: bool = field(default=False, init=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Requests that arrive inside are no client's."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def open(self, new: NewRequestData, terms: Terms) -> None:
        """A client's request arrived."""
        if self.is_paused or (self.on_finished is None and self.traces is None):
            return
        self.records[new.req_id] = RequestRecord(
            request_id=new.req_id,
            policy=terms.policy,
            quota_blocks=terms.quota.blocks,
            page_tokens=terms.quota.page_tokens,
            block_tokens=terms.quota.block_tokens,
            prompt_tokens=new.prompt_len,
            block_bytes=self.block_bytes,
            frames=frame_records(whole_items(new.mm_features)),
        )
        if self.traces is not None:
            self.traces.open(new)

    def stepped(self, request: RequestState) -> None:
        """A step of a request ended."""
        if self.traces is not None:
            self.traces.stepped(request)

    def left(self, request: RequestState, *, is_preempted: bool) -> None:
        """A request gives up its slot; the blocks that it holds now are the most it had there."""
        leaving = self._count_recalled(request)
        record = self.records.get(request.request_id)
        if record is None:
            return
        num_blocks = len(request.blocks)
        extra_bytes = self.tables.slot_bytes + (request.bank.nbytes if request.bank else 0)
        extra_bytes += self.recaller.slot_bytes if self.recaller else 0
        record.peak_blocks = max(record.peak_blocks, num_blocks)
        record.kv_bytes = max(record.kv_bytes, num_blocks * self.block_bytes + extra_bytes)
        # the last sampled token was never computed
        record.output_tokens = max(0, request.computed_tokens + 1 - record.prompt_tokens)
        record.full_cache_blocks = ceil_div(request.computed_tokens, record.block_tokens)
        record.compressions += request.compressions
        record.compression_seconds += request.compression_seconds
        record.preemptions += is_preempted
        if self.recaller is not None:
            recalled = Recalled() if leaving is None else leaving.read()
            _note_host(record, request, recalled, self.recaller)
        if self.traces is not None:
            self.traces.left(request)

    def _count_recalled(self, request: RequestState) -> Leaving | None:
        """What a request that gives up its slot brought back. Never raises, nor waits."""
        is_asked = self.summarizes or request.request_id in self.records
        if self.recaller is None or not request.recalls or not is_asked or self.is_paused:
            return None
        try:
            leaving = Leaving.of(request, self.recaller)
        except Exception:  # noqa: BLE001
            # what only reports does not end a request
            warn_once("what requests bring back cannot be counted: their report lacks it")
            return None
        if self.summarizes:
            self.leaving.append(leaving)
        return leaving

    def prefilled(self, request: RequestState) -> None:
        """The prompt of a request is in the cache. Never raises; a record reads the device."""
        if self.summarizes and request.has_classes and not self.is_paused:
            try:
                self.summaries[request.request_id] = Summary.of(request, self.tables)
            except Exception:  # noqa: BLE001
                # what only reports does not end a request
                warn_once("what requests keep cannot be counted: their answers do not say it")
        record = self.records.get(request.request_id)
        if record is None:
            return
        try:
            _count_kept(record, request, self.tables)
        except Exception:  # noqa: BLE001
            # what only reports does not end a request
            warn_once("what requests keep cannot be counted: their report lacks it")
        if self.traces is not None:
            self.traces.prefilled(request)

    def take(self) -> Counted | None:
        """What was counted since the last time, which is forgotten here; None if nothing was."""
        if not self.summaries and not self.leaving:
            return None
        taken = Counted(self.summaries, self.leaving)
        self.summaries, self.leaving = {}, []
        return taken

    def close(self, request_id: str) -> None:
        """A request ended."""
        record = self.records.pop(request_id, None)
        if record is None:
            return
        if self.on_finished is not None:
            self.on_finished(record)
        if self.traces is not None:
            self.traces.close(request_id, asdict(record))


def _count_kept(record: RequestRecord, request: RequestState, tables: HeadTables) -> None:
    """Count what each class of head holds after prefill."""
    slot = request.slot
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


def _note_host(
    record: RequestRecord, request: RequestState, recalled: Recalled, recaller: Recaller
) -> None:
    """Add what a request that gives up its slot had of host memory."""
    record.recall = request.recall
    if request.recall == "on" and not request.recalls:
        record.recall = "not reached"
    if (room := request.recall_room) is not None:
        record.recall_entry_tokens = room.entry_tokens
    record.recall_steps += recalled.steps
    record.recalled_tokens += recalled.tokens
    record.moved_tokens += recalled.moved_tokens
    record.moved_bytes += recalled.moved_bytes
    if request.host is not None:
        record.host_bytes = len(request.host.blocks) * recaller.tier.block_bytes
        record.reused_tokens += request.host.num_tokens
