"""Slots: which requests the worker holds, from admission to their end, preemptions included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.frame_groups import whole_items
from vllm_budgetkv.cache.requests import RequestState
from vllm_budgetkv.cache.vision import spans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.cache.probe.probes import Probes
    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.report import Reports
    from vllm_budgetkv.cache.rules import Arrival, Rules
    from vllm_budgetkv.cache.spans import PromptSpans
    from vllm_budgetkv.cache.tables import HeadTables


@dataclass
class Slots:
    """The requests of one worker.

    Args:
        tables: page tables; rows are claimed and released here.
        rules: which policies there are, and what requests under them may hold.
        probes: keep the seeds of requests that are to come.
        reports: told of every client request.
        arrival_of: what is known of a new request beside its prompt.
        recaller: brings tokens back from host memory; None where nothing does.
        group: of the lists of blocks that the engine keeps of a request, which is ours.
        requests: those that hold a slot, by id.
        spans: of every unfinished request, also of those that were preempted.
        arrivals: of every unfinished request, as its spans.
    """

    tables: HeadTables
    rules: Rules
    probes: Probes
    reports: Reports
    arrival_of: Callable[[NewRequestData], Arrival]
    recaller: Recaller | None
    group: int = 0
    requests: dict[str, RequestState] = field(default_factory=dict, init=False)
    spans: dict[str, PromptSpans] = field(default_factory=dict, init=False)
    arrivals: dict[str, Arrival] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._policies = self.rules.policies
        self._free = list(reversed(range(self.tables.lens.shape[0])))

    def follow(self, scheduled: SchedulerOutput) -> list[RequestState]:
        """Do what the scheduler did: end, preempt, admit, resume and grow requests.

        Returns:
            Those of which host memory keeps the beginning, so that they take it over.
        """
        told = scheduled.kv_connector_metadata
        places: Mapping[str, HostPlace] = {} if told is None else told.places
        for request_id in scheduled.finished_req_ids:
            self.end(request_id)
        for request_id in scheduled.preempted_req_ids or ():
            self._release(request_id, is_preempted=True)
        if places:
            assert self.recaller is not None
            self.recaller.tier.prepare(places.values())
        for new in scheduled.scheduled_new_reqs:
            self._admit_new(new, places.get(new.req_id))
        cached = scheduled.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            new_blocks = cached.new_block_ids[index]
            blocks = list(new_blocks[self.group]) if new_blocks else []
            if request_id in cached.resumed_req_ids:
                computed_tokens = cached.num_computed_tokens[index]
                self.admit(request_id, blocks, computed_tokens, places.get(request_id))
            elif blocks:
                self._grow(self.requests[request_id], blocks)
        return [self.requests[name] for name, place in places.items() if place.num_tokens]

    def end(self, request_id: str) -> None:
        """Forget a request."""
        self._release(request_id, is_preempted=False)
        self.spans.pop(request_id, None)
        self.arrivals.pop(request_id, None)
        self.probes.forget(request_id)
        self.reports.close(request_id)

    def _release(self, request_id: str, *, is_preempted: bool) -> None:
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        self.reports.left(request, is_preempted=is_preempted)
        if self.rules.check_ledger and request.shared:
            self.tables.pool.poison(self.tables.pages_of(request.blocks).flatten())
        self.tables.release(request.slot)
        if self.recaller is not None:
            self.recaller.release(request.slot)
        self._free.append(request.slot)

    def _admit_new(self, new: NewRequestData, place: HostPlace | None) -> None:
        request_id = new.req_id
        if request_id not in self.spans:
            device, features = self.tables.lens.device, whole_items(new.mm_features)
            spans, arrival = spans_of(new.prompt_len, features, device), self.arrival_of(new)
            self.introduce(request_id, spans, arrival)
            if arrival.parent_id is None:
                self.reports.open(new, arrival.terms)
        # runner V2 resumes a preempted request as a new one
        self.admit(request_id, list(new.block_ids[self.group]), new.num_computed_tokens, place)

    def introduce(self, request_id: str, spans: PromptSpans, arrival: Arrival) -> None:
        """Note what a request is, before it is admitted for the first time."""
        self.spans[request_id] = spans
        self.arrivals[request_id] = arrival

    def admit(
        self,
        request_id: str,
        blocks: list[int],
        computed_tokens: int,
        place: HostPlace | None = None,
    ) -> None:
        """Give a request that was introduced a slot; a seed of it is its first bank.

        Args:
            request_id: its id.
            blocks: block ids that it holds.
            computed_tokens: tokens in front of its first chunk.
            place: where host memory keeps its prompt; what is there of it must be replayed.
        """
        # runner V2 may resume a request that it never said was preempted
        self._release(request_id, is_preempted=True)
        slot = self._free.pop()
        if place is not None:
            assert self.recaller is not None
            assert computed_tokens == place.num_tokens
            self.recaller.tier.enter(slot, place)
        arrival = self.arrivals[request_id]
        held_tokens = computed_tokens if place is None else 0
        self.requests[request_id] = RequestState(
            request_id=request_id,
            slot=slot,
            terms=arrival.terms,
            policy=self._policies[arrival.terms.policy],
            spans=self.spans[request_id],
            blocks=blocks,
            computed_tokens=held_tokens,
            parent_id=arrival.parent_id,
            bank=self.probes.seed_of(request_id),
            host=place,
        )
        self.tables.extend_identity(slot, 0, blocks)
        self.tables.set_identity_length(slot, held_tokens)

    def _grow(self, request: RequestState, blocks: list[int]) -> None:
        first_block = len(request.blocks)
        request.grow(blocks)
        self.tables.extend_identity(request.slot, first_block, blocks)
