"""Slots: which requests the worker holds, from admission to their end, preemptions included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv.spans import PromptSpans
from vllm_budgetkv.vision import frame_records, vision_items
from vllm_budgetkv.worker.report import RequestRecord
from vllm_budgetkv.worker.requests import RequestState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.worker.bank import ProbeBank
    from vllm_budgetkv.worker.tables import HeadTables


@dataclass
class Slots:
    """The requests of one worker.

    Args:
        tables: page tables; rows are claimed and released here.
        quota: of every new request.
        policy_name: for the records.
        block_bytes: bytes of a block of this rank.
        parent_of_new: id of the request that a new one looks ahead for; None for a client's.
        poison: fill the pages of a private request with NaN when it goes.
        on_finished: gets the record of every client request that ended.
        has_clients: whether new requests are a client's; False while the worker warms up.
        requests: those that hold a slot, by id.
        spans: of every unfinished request, also of those that were preempted.
        parents: id of the request that each unfinished look-ahead runs for, by its own id.
        records: of every unfinished client request.
        seeds: banks that look-aheads filled, by the id of the request they are for.
    """

    tables: HeadTables
    quota: Quota
    policy_name: str
    block_bytes: int
    parent_of_new: Callable[[NewRequestData], str | None]
    poison: bool
    on_finished: Callable[[RequestRecord], None]
    has_clients: bool = True
    requests: dict[str, RequestState] = field(default_factory=dict)
    spans: dict[str, PromptSpans] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    records: dict[str, RequestRecord] = field(default_factory=dict)
    seeds: dict[str, ProbeBank] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(reversed(range(self.tables.lens.shape[0])))

    def follow(self, scheduled: SchedulerOutput) -> None:
        """Do what the scheduler did: end, preempt, admit, resume and grow requests."""
        for request_id in scheduled.finished_req_ids:
            self.finish(request_id)
        for request_id in scheduled.preempted_req_ids or ():
            self._preempt(request_id)
        for new in scheduled.scheduled_new_reqs:
            self._admit_new(new)
        cached = scheduled.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            new_blocks = cached.new_block_ids[index]
            blocks = list(new_blocks[0]) if new_blocks else []
            if request_id in cached.resumed_req_ids:
                self.admit(request_id, blocks, cached.num_computed_tokens[index])
            else:
                self._grow(request_id, blocks)

    def finish(self, request_id: str) -> None:
        """Forget a request and hand on its record, if it has one."""
        self._release(request_id)
        self.spans.pop(request_id, None)
        self.parents.pop(request_id, None)
        self.seeds.pop(request_id, None)
        record = self.records.pop(request_id, None)
        if record is not None:
            self.on_finished(record)

    def parent_of(self, request_id: str) -> str | None:
        """Id of the request that a look-ahead runs for; None for a client's request."""
        return self.parents.get(request_id)

    def _preempt(self, request_id: str) -> None:
        self._release(request_id)
        if request_id in self.records:
            self.records[request_id].preemptions += 1

    def _release(self, request_id: str) -> None:
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        request.record.leave(request.computed_tokens)
        if self.poison and request.shared:
            self.tables.pool.poison(self.tables.pages_of(request.blocks).flatten())
        self.tables.release(request.slot)
        self._free.append(request.slot)

    def _admit_new(self, new: NewRequestData) -> None:
        request_id = new.req_id
        if request_id not in self.spans:
            items = tuple(vision_items(new.mm_features))
            device = self.tables.lens.device
            self.spans[request_id] = PromptSpans(new.prompt_len, items, device)
            parent_id = self.parent_of_new(new)
            if parent_id is not None:
                self.parents[request_id] = parent_id
            elif self.has_clients:
                self.records[request_id] = self._new_record(request_id, new)
        # runner V2 resumes a preempted request as a new one
        self.admit(request_id, list(new.block_ids[0]), new.num_computed_tokens)

    def admit(self, request_id: str, blocks: list[int], computed_tokens: int) -> None:
        """Give a request whose `spans` are known a slot; a seed of it is its first bank."""
        self._release(request_id)
        slot = self._free.pop()
        request = RequestState(
            request_id=request_id,
            slot=slot,
            quota=self.quota,
            spans=self.spans[request_id],
            blocks=blocks,
            computed_tokens=computed_tokens,
            record=self.records.get(request_id) or self._new_record(request_id, None),
        )
        seed = self.seeds.get(request_id)
        if seed is not None:
            # a copy, so that a preempted request starts again with the look-ahead's queries
            request.bank = seed.copy()
        self.requests[request_id] = request
        self.tables.extend_identity(slot, 0, blocks)
        self.tables.set_identity_length(slot, computed_tokens)

    def _grow(self, request_id: str, blocks: list[int]) -> None:
        if not blocks:
            return
        request = self.requests[request_id]
        if request.shared:
            raise RuntimeError(
                f"request {request_id} shares its head-pages, so it already holds its quota of "
                f"{request.quota.blocks} blocks, but it was given {len(blocks)} more"
            )
        self.tables.extend_identity(request.slot, len(request.blocks), blocks)
        request.blocks += blocks

    def _new_record(self, request_id: str, new: NewRequestData | None) -> RequestRecord:
        return RequestRecord(
            request_id=request_id,
            policy=self.policy_name,
            quota_blocks=self.quota.blocks,
            page_tokens=self.quota.page_tokens,
            prompt_tokens=self.spans[request_id].prompt_tokens,
            block_bytes=self.block_bytes,
            frames=frame_records(new.mm_features) if new else [],
        )

    def share(self, request: RequestState) -> None:
        """Turn a request from identity to shared, before its first compression."""
        self.tables.share(request.slot, request.blocks, request.computed_tokens)
        request.shared = True
