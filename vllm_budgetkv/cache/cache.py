"""The worker's cache: what every request does in a step. No number here comes from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv.cache.ledger import check_slot
from vllm_budgetkv.cache.pictures import tokens_ahead
from vllm_budgetkv.cache.requests import RequestState, RowPlan
from vllm_budgetkv.cache.step import Step, count_reading_rows
from vllm_budgetkv.ops import backend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.cache.report import Reports
    from vllm_budgetkv.cache.rows import Rows
    from vllm_budgetkv.cache.slots import Slots
    from vllm_budgetkv.cache.step import Layers
    from vllm_budgetkv.cache.tables import HeadTables


@dataclass
class BudgetCache:
    """Everything that the worker holds under quotas. A step is planned, opened, run and ended here.

    Args:
        slots: the requests.
        layers: what the layers of every step work with.
        rows: rows of the current batch; there are as many as slots.
        reports: told of every client request.
        check_ledger: check every slot after every step.
        plans: what each request does in the current step, by id.
        step: the current batch; None between batches.
    """

    slots: Slots
    layers: Layers
    rows: Rows
    reports: Reports
    check_ledger: bool
    plans: dict[str, RowPlan] = field(default_factory=dict, init=False)
    step: Step | None = field(default=None, init=False)

    @property
    def tables(self) -> HeadTables:
        return self.layers.tables

    @property
    def compiles(self) -> bool:
        """Whether the first long request would wait for kernels to be compiled."""
        is_triton = backend.of(self.tables.lens) == "triton"
        return is_triton and self.slots.rules.shared_blocks > 0

    @property
    def has_chunks(self) -> bool:
        """Whether a request of the current step gets prompt tokens."""
        return any(not plan.is_decode for plan in self.plans.values())

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Follow the scheduler and plan the step; compact requests whose decode would overflow.

        A request that begins with what host memory keeps holds that behind it.
        """
        if self.layers.recaller is not None:
            self.layers.recaller.join()
        for request in self.slots.follow(scheduled):
            assert self.layers.replay is not None
            self.layers.replay.run(request)
        self.plan_step(scheduled.num_scheduled_tokens)

    def plan_step(self, num_tokens_of: Mapping[str, int]) -> None:
        """Plan a step in which every request, by id, gets so many tokens.

        One whose prompt is behind it holds what stays of it from now on.
        """
        for request_id in num_tokens_of:
            request = self.slots.requests[request_id]
            if request.unchosen and not request.in_prefill(request.computed_tokens):
                self._choose(request)
        self.plans = {
            request_id: self._plan(self.slots.requests[request_id], num_tokens)
            for request_id, num_tokens in num_tokens_of.items()
        }

    def open_step(
        self,
        row_ids: Sequence[str],
        query_start: torch.Tensor,
        pictures: Mapping[int, Sequence[Range]] | None = None,
    ) -> Step:
        """Order the plans as the batch's rows; a decode step takes its pages.

        Args:
            row_ids: request id of each row; all have a plan.
            query_start: int [R + 1] on the host.
            pictures: whose tokens attend to each other both ways, by the index of their row.

        Raises:
            RuntimeError: a chunk ends inside of such a picture.
        """
        plans = [self.plans[request_id] for request_id in row_ids]
        starts = query_start.tolist()
        self.rows.fill(plans, starts)
        rows = self.rows.first(len(plans))
        is_decode = all(plan.is_decode for plan in plans)
        if is_decode:
            self.tables.reserve(rows)
            rows.shared.zero_()
        # what a decode step leaves behind is counted in rows
        first_tokens = range(len(plans)) if is_decode else starts
        retrieving, recalling = count_reading_rows(plans)
        self.step = Step(
            layers=self.layers,
            plans=plans,
            starts=starts,
            rows=rows,
            is_decode=is_decode,
            writes=self.layers.probes.open_writes(plans, first_tokens),
            num_retrieving_rows=retrieving,
            num_recalling_rows=recalling,
            lead=self.layers.replay.lead([plan.request for plan in plans])
            if self.layers.replay is not None
            else None,
            streams=self.layers.streaming.open(plans, starts)
            if self.layers.streaming is not None
            else [],
            ahead=tokens_ahead(plans, starts, pictures or {}, self.rows.slots.device),
        )
        return self.step

    def step_to_capture(self, num_rows: int) -> Step:
        """A decode step of any `num_rows` requests: its layers read the tensors of the cache.

        Until a step is opened, its rows have no tokens and change nothing.

        Raises:
            ValueError: the cache has room for fewer rows.
        """
        if num_rows > (capacity := len(self.rows.slots)):
            raise ValueError(
                f"a graph of {num_rows} rows was asked for, but --max-num-seqs is {capacity}: "
                "lower --max-cudagraph-capture-size"
            )
        self.rows.fill([], [0])
        return Step(
            layers=self.layers,
            plans=[],
            starts=range(num_rows + 1),
            rows=self.rows.first(num_rows),
            is_decode=True,
            writes=[],
            num_retrieving_rows=num_rows if self.layers.reader.choice else 0,
            num_recalling_rows=num_rows if self.layers.recaller else 0,
            lead=None,
            streams=[],
            ahead=None,
        )

    def end_step(self) -> None:
        """Advance every request that ran, and check the ledger if asked to.

        Raises:
            RuntimeError: the model ran without our step, so nothing was attended to.
        """
        if self.plans and self.step is None:
            raise RuntimeError(
                f"the model computed {len(self.plans)} requests without the metadata of this "
                "plugin: it does not serve this model runner; start without --kv-policy"
            )
        if self.step is not None:
            self.step.close()
        for plan in self.plans.values():
            self._advance(plan)
        self.plans = {}
        self.step = None
        if self.check_ledger:
            for request in self.slots.requests.values():
                check_slot(self.tables, request, self.layers.recaller)

    def _plan(self, request: RequestState, num_tokens: int) -> RowPlan:
        quota, prompt_tokens = request.quota, request.prompt_tokens
        start_tokens = request.computed_tokens
        stop_tokens = start_tokens + num_tokens
        plan = RowPlan(request, num_tokens)
        if request.in_prefill(start_tokens):
            compresses = quota.compresses_after(stop_tokens, prompt_tokens)
            plan.compress = compresses and not request.postponed
        elif quota.compresses:
            last_stop = quota.next_stop(start_tokens, prompt_tokens)
            assert stop_tokens <= last_stop, "output runs past a compaction"
        compacts = quota.compacts_before(start_tokens, prompt_tokens)
        if plan.compress or compacts or request.postponed:
            self.layers.compressor.share(request)
        if compacts:
            self._compact(request)
        plan.bank_positions = self.layers.probes.plan(request, start_tokens, stop_tokens)
        return plan

    def _compact(self, request: RequestState) -> None:
        """Compress all layers before a decode step; what was recalled is no part of them."""
        recaller = self.layers.recaller
        if recaller is not None and request.recalls:
            recaller.detach(request)
        self.layers.compressor.compress_all(request)
        if recaller is not None and request.recalls:
            recaller.attach(request)

    def _advance(self, plan: RowPlan) -> None:
        request, ends_prefill, ends_chunks = plan.request, plan.ends_prefill, plan.ends_chunks
        request.advance(plan.num_tokens)
        if plan.compress:
            self.layers.compressor.finished(request, last=ends_chunks)
        if ends_chunks and not request.unchosen:
            if request.in_tier and self.layers.compressor.options.second_look:
                self._look_again(request)
            self._end_chunks(request)
        if ends_prefill and request.parent_id is not None:
            assert request.bank is not None
            self.layers.probes.seed(request.parent_id, request.bank)
        self.reports.stepped(request)

    def _choose(self, request: RequestState) -> None:
        """Let a request hold what stays of its prompt, which is all behind it."""
        self.layers.probes.drop_seed(request)
        self._look_again(request)
        self._end_chunks(request)

    def _look_again(self, request: RequestState) -> None:
        assert self.layers.recaller is not None and self.layers.replay is not None
        self.layers.recaller.join()
        self.layers.replay.again(request)

    def _end_chunks(self, request: RequestState) -> None:
        """What stays of a prompt is chosen; what was dropped may come back."""
        if request.parent_id is None:
            self.reports.prefilled(request)
        if request.recall_room is not None:
            self._open_recall(request)

    def _open_recall(self, request: RequestState) -> None:
        """Let the heads of a request bring back what its prompt's compressions dropped."""
        recaller, probes = self.layers.recaller, self.layers.probes
        assert recaller is not None
        recaller.join()
        layers = range(self.tables.num_layers)
        recaller.open(request, probes.of(request, layers, request.computed_tokens))
        request.bring_back()
