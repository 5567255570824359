"""The worker's cache: what every request does in a step. No number here comes from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv.ops import backend
from vllm_budgetkv.worker.bank import ProbeBank
from vllm_budgetkv.worker.ledger import check_slot
from vllm_budgetkv.worker.report import record_kept
from vllm_budgetkv.worker.requests import RequestState, RowPlan
from vllm_budgetkv.worker.rows import DecodeBuffers, Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.worker.compressor import Compressor
    from vllm_budgetkv.worker.slots import Slots
    from vllm_budgetkv.worker.step import Step
    from vllm_budgetkv.worker.tables import HeadTables


@dataclass
class BudgetCache:
    """Everything that the worker holds under the quota.

    Args:
        quota: the largest of any request.
        tables: page tables and the pool.
        slots: the requests.
        compressor: compresses one layer of one request.
        num_query_heads: query heads of this rank (Hq).
        check_ledger: check every slot after every step.
        reports: whether records note which tokens were kept.
        layer_index: index in the pool of each layer, by vLLM's name.
        rows: rows of the current batch; there are as many as slots.
        buffers: what a decode step writes for itself.
        plans: what each request does in the current step, by id.
        step: the current batch; None between batches.
    """

    quota: Quota
    tables: HeadTables
    slots: Slots
    compressor: Compressor
    num_query_heads: int
    check_ledger: bool
    reports: bool
    layer_index: dict[str, int]
    rows: Rows = field(init=False)
    buffers: DecodeBuffers = field(init=False)
    plans: dict[str, RowPlan] = field(default_factory=dict)
    step: Step | None = None

    def __post_init__(self) -> None:
        num_rows = len(self.tables.num_free)
        self.rows = Rows.empty(num_rows, self.tables.lens.device)
        self.buffers = DecodeBuffers.empty(
            self.tables,
            num_rows,
            self.num_query_heads,
            keeps_queries=self.quota.compresses and self.compressor.policy.needs_scores,
        )

    @property
    def compiles(self) -> bool:
        """Whether the first long request would wait for kernels to be compiled."""
        return self.quota.compresses and backend.of(self.tables.lens) == "triton"

    @property
    def has_chunks(self) -> bool:
        """Whether a request of the current step gets prompt tokens."""
        return any(not plan.is_decode for plan in self.plans.values())

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Follow the scheduler and plan the step; compact requests whose decode would overflow."""
        self.slots.follow(scheduled)
        self.plan_step(scheduled.num_scheduled_tokens)

    def plan_step(self, num_tokens_of: Mapping[str, int]) -> None:
        """Plan a step in which every request, by id, gets so many tokens."""
        self.plans = {
            request_id: self._plan(self.slots.requests[request_id], num_tokens)
            for request_id, num_tokens in num_tokens_of.items()
        }

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
            self.step.finish()
        for plan in self.plans.values():
            self._advance(plan)
        self.plans = {}
        self.step = None
        if self.check_ledger:
            for request in self.slots.requests.values():
                check_slot(
                    self.tables,
                    request.slot,
                    request.blocks,
                    request.shared,
                    request.quota.blocks,
                )

    def _plan(self, request: RequestState, num_tokens: int) -> RowPlan:
        quota, prompt_tokens = request.quota, request.prompt_tokens
        start_tokens = request.computed_tokens
        stop_tokens = start_tokens + num_tokens
        plan = RowPlan(request, num_tokens)
        if request.in_prefill(start_tokens):
            plan.compress = quota.compresses_after(stop_tokens, prompt_tokens)
        elif quota.compresses:
            last_stop = quota.next_stop(start_tokens, prompt_tokens)
            assert stop_tokens <= last_stop, "output runs past a compaction"
        compacts = quota.compacts_before(start_tokens, prompt_tokens)
        if (plan.compress or compacts) and not request.shared:
            self._share(request)
        if compacts:
            self.compressor.compact_all(request)
        plan.bank_positions = self._bank_positions(request, start_tokens, stop_tokens)
        return plan

    def _share(self, request: RequestState) -> None:
        self.slots.share(request)
        request.layer_budgets = self.compressor.new_layer_budgets(request.quota)

    def _bank_positions(self, request: RequestState, start: int, stop: int) -> list[int]:
        """Positions of this step's tokens whose queries join the request's bank."""
        if not self._needs_bank(request, stop):
            return []
        spans, options = request.spans, self.compressor.options
        source = self.compressor.policy.probe_source
        is_seeded = request.request_id in self.slots.seeds
        if request.bank is None:
            request.bank = self.new_bank()
        if source == "recent":
            return list(range(max(start, stop - options.probe_tokens), stop))
        if source == "template":
            template = spans.last_text_positions(0, spans.prompt_tokens, options.template_tokens)
            return [] if is_seeded else [p for p in template if start <= p < stop]
        if is_seeded:
            # the look-ahead's queries already stand for all text before the last vision token
            start = max(start, spans.end_of_vision)
        return spans.last_text_positions(start, stop, options.probe_tokens)

    def _needs_bank(self, request: RequestState, stop_tokens: int) -> bool:
        compressor, quota = self.compressor, request.quota
        if not (quota.compresses and compressor.policy.needs_scores):
            return False
        if self.slots.parent_of(request.request_id) is not None:
            return True
        if compressor.policy.probe_source == "template":
            # its queries pass once, long before the output of a short prompt needs them
            return True
        # a short prompt needs probes only once its output comes near the quota; where the prompt
        # itself does, all of its chunks give theirs, however they were cut
        near_tokens = max(stop_tokens, request.prompt_tokens)
        return near_tokens + compressor.options.probe_tokens > quota.tokens

    def new_bank(self) -> ProbeBank:
        """An empty bank for one request."""
        layout, options = self.tables.pool.layout, self.compressor.options
        is_template = self.compressor.policy.probe_source == "template"
        return ProbeBank(
            self.tables.num_layers,
            options.template_tokens if is_template else options.probe_tokens,
            self.num_query_heads,
            layout.head_size,
            layout.dtype,
            self.tables.lens.device,
        )

    def _advance(self, plan: RowPlan) -> None:
        request = plan.request
        was_prefill = request.in_prefill(request.computed_tokens)
        request.computed_tokens += plan.num_tokens
        request.grown_tokens += plan.num_tokens
        ends_prefill = was_prefill and not request.in_prefill(request.computed_tokens)
        if plan.compress:
            self.compressor.finish(request, last=ends_prefill)
        extra_bytes = self.tables.slot_bytes + (request.bank.nbytes if request.bank else 0)
        request.record.observe(len(request.blocks), extra_bytes)
        if ends_prefill:
            self._end_prefill(request)

    def _end_prefill(self, request: RequestState) -> None:
        parent_id = self.slots.parent_of(request.request_id)
        if parent_id is not None:
            assert request.bank is not None
            self.slots.seeds[parent_id] = request.bank
        elif self.reports and request.request_id in self.slots.records:
            record_kept(request, self.tables)
