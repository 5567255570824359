"""The scheduler: notes long requests for the manager, runs look-aheads, cuts chunks at frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from vllm_budgetkv.activation import config_of, resolve_quota
from vllm_budgetkv.scheduler.lookahead import lookahead_id, make_lookahead, parent_of
from vllm_budgetkv.scheduler.manager import QuotaManager
from vllm_budgetkv.vision import spans_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

# a child of vLLM's logger, which alone has a handler
logger = init_logger("vllm.plugins.budgetkv")


class BudgetScheduler(AsyncScheduler):
    """`AsyncScheduler` plus the notes and the look-aheads of requests that must compress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config_of(self.vllm_config)
        self._quota = resolve_quota(self.vllm_config, self._config)
        (self._manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(self._manager, QuotaManager)
        self._held: dict[str, Request] = {}
        self._scheduling = False
        # vLLM's own reason to cut chunks, recurrent state, is refused at start
        self.need_mamba_block_aligned_split = self._config.chunk_ends == "frames"
        self._log_banner()

    def _log_banner(self) -> None:
        quota = self._quota
        if not quota.compresses:
            logger.info("budgetkv: policy %s, no quota", self._config.policy)
            return
        logger.info(
            "budgetkv: policy %s, quota %d blocks of %d tokens (%d tokens per head, %.0f%% of them "
            "retained budget), chunks of %d tokens, %.1f requests at quota fit the pool of %d "
            "blocks, look-ahead %s",
            self._config.policy,
            quota.blocks,
            quota.page_tokens,
            quota.tokens,
            100 * quota.budget_tokens / quota.tokens,
            quota.chunk_tokens,
            self.kv_cache_config.num_blocks / quota.blocks,
            self.kv_cache_config.num_blocks,
            "on" if self._config.looks_ahead else "off",
        )

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._scheduling = True
        try:
            return super().schedule(throttle_prefills)
        finally:
            self._scheduling = False

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting) requests of clients; a look-ahead counts as its waiting parent.

        vLLM lifts the chunk cap when it counts one request in all. The quota has no room for that,
        so while scheduling a request is never alone. The one more counts as running, because vLLM
        also asks whether any is left waiting, and then ends `--prefill-schedule-interval`.
        """
        num_running, num_waiting = super().get_request_counts()
        if self._scheduling:
            return num_running + 1, num_waiting
        lookaheads = [self.requests[lookahead_id(parent_id)] for parent_id in self._held]
        ahead_running = sum(r.status == RequestStatus.RUNNING for r in lookaheads)
        return num_running - ahead_running, num_waiting + ahead_running

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of the next chunk: up to the last whole frame if it holds one, else as many."""
        start = request.num_computed_tokens
        start += num_new_local_computed_tokens + num_external_computed_tokens
        stop = start + num_new_tokens
        if self._quota.fits(request.num_tokens) or stop >= request.num_prompt_tokens:
            return num_new_tokens
        spans = spans_of(request.num_prompt_tokens, request.mm_features)
        between_frames = spans.trailing_frame_start(stop)
        return between_frames - start if between_frames > start else num_new_tokens

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            super().add_request(request)
            return
        if request.resumable and self._quota.compresses:
            # a session grows its prompt, but the quota's plan needs its length from the start;
            # vLLM ends the requests of this set with an error that reaches the client
            logger.warning("budgetkv: streaming-input session %s refused", request.request_id)
            self.encoder_cache_mismatch_reqs.add(request.request_id)
        if self._expect(request):
            request.skip_reading_prefix_cache = True
        if self._config.looks_ahead and not self._quota.fits(request.num_prompt_tokens):
            limit_tokens = min(self._config.lookahead_limit_tokens, self._quota.budget_tokens)
            ahead = make_lookahead(request, limit_tokens, self._config.lookahead_enough_tokens)
            if ahead is not None:
                self._held[request.request_id] = request
                self._expect(ahead)
                super().add_request(ahead)
                return
        super().add_request(request)

    def _expect(self, request: Request) -> bool:
        most_tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        if parent_of(request.request_id) is not None:
            # private though it fits: nothing of it may be published
            most_tokens = self._manager.quota_tokens + 1
        return self._manager.expect(request.request_id, request.num_tokens, most_tokens)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._expect(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if request_ids is None:
            ids = [*self.requests, *self._held]
        else:
            ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        cancelled = [self._held.pop(request_id) for request_id in ids if request_id in self._held]
        for parent in cancelled:
            parent.status = finished_status
            self._manager.forget(parent.request_id)
            # the worker never saw the parent, but it may keep the look-ahead's queries for it
            self.finished_req_ids.add(parent.request_id)
            ids.append(lookahead_id(parent.request_id))
        finished = super().finish_requests(ids, finished_status)
        return cancelled + [r for r in finished if parent_of(r.request_id) is None]

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        result = super()._free_request(request, delay_free_blocks)
        self._manager.forget(request.request_id)
        parent_id = parent_of(request.request_id)
        if parent_id is not None:
            if self.finished_req_ids_dict is not None:
                self.finished_req_ids_dict[request.client_index].discard(request.request_id)
            parent = self._held.pop(parent_id, None)
            if parent is not None:
                super().add_request(parent)
        return result

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            of_client.outputs = [
                output for output in of_client.outputs if parent_of(output.request_id) is None
            ]
        return outputs
