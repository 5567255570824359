"""The scheduler: notes requests for the manager, runs look-aheads, ends chunks where it must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.request import Request, RequestStatus

from vllm_budgetkv.arithmetic.host_blocks import HostBlocks
from vllm_budgetkv.arithmetic.pictures import whole_tokens
from vllm_budgetkv.scheduler.answers import Answers
from vllm_budgetkv.scheduler.banner import Banner
from vllm_budgetkv.scheduler.chunks import EncoderLimits, chunk_stop, must_be_whole
from vllm_budgetkv.scheduler.connector import HostConnector, ReuseRules, end_of_items
from vllm_budgetkv.scheduler.frame_groups import EncoderRoom
from vllm_budgetkv.scheduler.lookahead import LookaheadParams, Lookaheads, make_lookahead
from vllm_budgetkv.scheduler.manager import Expectation, QuotaManager
from vllm_budgetkv.scheduler.prompts import HostPrompts
from vllm_budgetkv.scheduler.spec import blocks_beside, our_group
from vllm_budgetkv.scheduler.stripped import StrippedItems
from vllm_budgetkv.scheduler.turns import TurnScheduler
from vllm_budgetkv.start import host_memory, upstream
from vllm_budgetkv.start.activation import config_of, rules_of
from vllm_budgetkv.start.pictures import Pictures
from vllm_budgetkv.start.pool_size import RESERVED_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.terms import Terms

# a child of vLLM's logger, which alone has a handler
logger = init_logger("vllm.plugins.budgetkv")


class BudgetScheduler(TurnScheduler):
    """vLLM's scheduler plus the notes and the look-aheads of requests that must compress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config_of(self.vllm_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        manager = managers[our_group(self.kv_cache_config)]
        assert isinstance(manager, QuotaManager)
        self._manager = manager
        # of recurrent state or windows: a request holds them whatever its quota
        self._blocks_beside = blocks_beside(self.kv_cache_config, self.vllm_config)
        self._rules = rules_of(self.vllm_config)
        # what a request gets that asks for nothing
        self.quota = self._rules.default.quota
        self.lookaheads = Lookaheads()
        self._stripped = StrippedItems()
        # may hold the encoder to less
        self.encoder_room = EncoderRoom.of(self)
        self.encoder_limits = EncoderLimits(
            embeds=self.encoder_room.tokens,
            keeps_items_whole=self.scheduler_config.disable_chunked_mm_input,
        )
        self._waits_for_encoder = False
        self._host_blocks = host_memory.num_blocks(self.vllm_config, self._config)
        # vLLM's own reason to cut chunks: recurrent state that others may begin with
        self._keeps_states = self.need_mamba_block_aligned_split
        self._pictures = Pictures.of(self.vllm_config, self.quota)
        cuts_chunks = self.quota.compresses or self._pictures.attend_both_ways
        self.need_mamba_block_aligned_split |= cuts_chunks
        if self._blocks_beside:
            coordinator = self.kv_cache_manager.coordinator
            upstream.replace_in(coordinator, "KVCacheCoordinator.cache_blocks", self._publish)
        quotas = self._rules.quotas.values()
        if any(quota.compresses and quota.recall is not None for quota in quotas):
            self.connector = self._make_connector()
            if self.log_stats:
                self.connector_prefix_cache_stats = PrefixCacheStats()
        self._answers = self._make_answers()
        Banner(
            vllm_config=self.vllm_config,
            config=self._config,
            rules=self._rules,
            pool_blocks=self.kv_cache_config.num_blocks,
            blocks_beside=self._blocks_beside,
            host_blocks=self._host_blocks,
        ).log()

    def _make_answers(self) -> Answers | None:
        """Makes what is said of requests that end; None if nobody asks."""
        if not (self._config.answer_report or self.log_stats):
            return None
        return Answers(
            says=self._config.answer_report,
            meters=self.log_stats,
            model_name=self.vllm_config.model_config.served_model_name,
            engine=str(self.vllm_config.parallel_config.data_parallel_index),
            host_blocks=self._host_use if self.connector is not None else None,
        )

    def _host_use(self) -> dict[str, int]:
        """Blocks of host memory, by state."""
        assert isinstance(self.connector, HostConnector)
        return self.connector.use

    def _make_connector(self) -> HostConnector:
        rules = ReuseRules(
            terms_of=self._terms_of,
            looks_ahead=lambda request: self._manager.expected(request.request_id).looks_ahead,
            may_begin=self._may_begin,
            stop_behind=self._stop_behind,
            probe_tokens=self._config.policy_options().probe_tokens,
        )
        blocks = HostBlocks(self._host_blocks)
        prompts = HostPrompts(blocks, self.quota.page_tokens, self._is_running)
        return HostConnector.of(
            self.vllm_config,
            self.kv_cache_config,
            prompts=prompts,
            rules=rules,
        )

    def _is_running(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        return request is not None and request.status == RequestStatus.RUNNING

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._waits_for_encoder = False
        for parent in self.lookaheads.take_lost():
            terms = self._terms_of(parent)
            ahead = self._lookahead_of(parent, terms)
            assert ahead is not None, "it had one when it came"
            self.lookaheads.run_late(parent, ahead)
            self._run_ahead(ahead, terms)
        return self._stripped.follow(super().schedule(throttle_prefills), self.requests)

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting) requests of clients; a look-ahead counts as its waiting parent.

        A late one counts beside its parent, which waits in vLLM's queue: vLLM takes requests that
        are not counted for ones that have ended.
        """
        num_running, num_waiting = super().get_request_counts()
        ahead = [self.requests[request_id] for request_id in self.lookaheads]
        ahead_running = sum(request.status == RequestStatus.RUNNING for request in ahead)
        return num_running - ahead_running, num_waiting + ahead_running

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of the next chunk; none if it must be whole and the step has no room for that."""
        start = request.num_computed_tokens
        start += num_new_local_computed_tokens + num_external_computed_tokens
        quota = self._quota_of(request)
        # where nothing is compressed vLLM alone cuts chunks: it waits for one as long as a block
        if quota.compresses:
            chunk_tokens = self._stop_behind(request, start) - start
            if must_be_whole(request, quota, start):
                return chunk_tokens if num_new_tokens >= chunk_tokens else 0
            num_new_tokens = min(num_new_tokens, chunk_tokens)
        num_new_tokens = whole_tokens(start, num_new_tokens, self._pictures.ahead(request, start))
        if not self._keeps_states or self._is_private(request):
            return num_new_tokens
        return super()._mamba_block_aligned_split(
            request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
        )

    def _is_private(self, request: Request) -> bool:
        return self._manager.expected(request.request_id).is_private

    def _publish(
        self, original: Callable[[Request, int], None], request: Request, num_tokens: int
    ) -> None:
        """Let others begin with what a request computed; with nothing of a private one, whose
        recurrent state, too, follows from a context that was compressed."""
        if not self._is_private(request):
            original(request, num_tokens)

    def _stop_behind(self, request: Request, start_tokens: int) -> int:
        quota, pictures = self._quota_of(request), self._pictures.ahead(request, start_tokens)
        return chunk_stop(request, quota, start_tokens, self.encoder_limits, pictures)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[Any, int, int, bool]:
        """A private request finds nothing in the cache's own blocks, only in host memory."""
        if self._is_private(request):
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """A chunk that must be whole waits where the encoder has no room for all of its items.

        Until it runs, nothing is encoded for requests behind it, and it holds no item back from
        the ones before it; so those end and it has its turn.
        """
        budget = 0 if self._waits_for_encoder else encoder_compute_budget
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, budget, shift_computed_tokens
        )
        is_cut = found[1] < num_new_tokens
        if is_cut and must_be_whole(request, self._quota_of(request), num_computed_tokens):
            self._waits_for_encoder = True
            self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return found

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            self._go_on(request)
            return
        assert request.request_id not in self.lookaheads.held, "duplicate request id"
        try:
            terms = self._admissible(request)
        except ValueError as error:
            # a front end of ours refuses it with this message; another one passes it on, and vLLM
            # ends the requests of this set with an error that reaches the client
            logger.warning("budgetkv: request %s refused: %s", request.request_id, error)
            self.encoder_cache_mismatch_reqs.add(request.request_id)
            if request.sampling_params is not None:
                # until it ends, workers hold it to what all get
                request.sampling_params.extra_args = None
            terms = self._rules.default
        ahead = self._lookahead_of(request, terms)
        self._expect(request, terms, looks_ahead=ahead is not None)
        if ahead is None:
            super().add_request(request)
        elif self._needs_none(request, self._kept_tokens(request)):
            self.lookaheads.spare(request.request_id)
            super().add_request(request)
        else:
            self.lookaheads.hold(request, ahead)
            self._run_ahead(ahead, terms)

    def _run_ahead(self, ahead: Request, terms: Terms) -> None:
        self._expect(ahead, terms)
        super().add_request(ahead)

    def _kept_tokens(self, request: Request) -> int:
        """Tokens of a prompt that arrives which host memory keeps."""
        connector = self.connector
        return connector.keeps_now(request) if isinstance(connector, HostConnector) else 0

    def _needs_none(self, request: Request, found_tokens: int) -> bool:
        """Whether nothing must run ahead of a prompt of which host memory keeps so much.

        Its question is read where it stands before anything is chosen, and asks with that alone.
        """
        prompt_tokens, terms = request.num_prompt_tokens, self._terms_of(request)
        end_tokens = end_of_items(request.mm_features)
        # an item without embeddings, or that cannot be read, is text for the worker
        postpones = all(
            terms.quota.postpones(prompt_tokens, found_tokens, end) for end in (0, end_tokens)
        )
        return found_tokens > 0 and postpones and terms.asks_itself(prompt_tokens, end_tokens)

    def _may_begin(self, request: Request, found_tokens: int) -> bool:
        is_kept = self._needs_none(request, found_tokens)
        return self.lookaheads.may_begin(request, is_kept=is_kept)

    def _go_on(self, request: Request) -> None:
        """The next input of a session; with an item that can never be computed it ends."""
        self._pictures.trim(request)
        refusal = self.encoder_room.refusal_of_whole(request)
        refusal = refusal or self._pictures.refusal(request.mm_features, self._quota_of(request))
        if refusal:
            logger.warning("budgetkv: session %s refused: %s", request.request_id, refusal)
            self.encoder_cache_mismatch_reqs.add(request.request_id)
        # it is passed on all the same, so that there is a step that ends it
        super().add_request(request)

    def _admissible(self, request: Request) -> Terms:
        """What a client's request is held to. Caps its output where it has no quota, cuts videos.

        Raises:
            ValueError: it cannot be served so.
        """
        params, prompt_tokens = request.sampling_params, request.num_prompt_tokens
        terms = self._rules.of(None if params is None else params.extra_args, prompt_tokens)
        if request.resumable and self.quota.compresses:
            # a session grows its prompt, but the quota's plan needs its length from the start
            raise ValueError("sessions that stream their input have no quota")
        self.encoder_room.cut(request)
        self._pictures.trim(request)
        if why := self._pictures.refusal(request.mm_features, terms.quota):
            raise ValueError(why)
        if not terms.quota.compresses and self.quota.compresses:
            # `--max-model-len` may exceed the pool, in which this request must fit
            pool_blocks = self.kv_cache_config.num_blocks - RESERVED_BLOCKS - self._blocks_beside
            room_tokens = pool_blocks * terms.quota.block_tokens - prompt_tokens
            if room_tokens < 1:
                raise ValueError("without a quota its prompt must fit the pool")
            request.max_tokens = min(request.max_tokens, room_tokens)
        return terms

    def _lookahead_of(self, request: Request, terms: Terms) -> Request | None:
        if not terms.lookahead_tokens or not terms.quota.compresses_prompt(
            request.num_prompt_tokens
        ):
            return None
        limit_tokens = min(terms.lookahead_tokens, terms.quota.budget_tokens)
        return make_lookahead(request, limit_tokens, terms.enough_tokens)

    def _expect(self, request: Request, terms: Terms, *, looks_ahead: bool = False) -> None:
        most_tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        # nothing of a look-ahead may be published, though it fits
        is_private = isinstance(request.sampling_params, LookaheadParams)
        is_private |= not terms.quota.fits(most_tokens)
        expectation = Expectation(terms, request.num_prompt_tokens, is_private, looks_ahead)
        self._manager.expect(request.request_id, expectation)

    def _terms_of(self, request: Request) -> Terms:
        return self._manager.expected(request.request_id).terms

    def _quota_of(self, request: Request) -> Quota:
        return self._manager.expected(request.request_id).quota

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if request_ids is None:
            ids = [*self.requests, *self.lookaheads.held]
        else:
            ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        cancelled = []
        late = [self.lookaheads.forget_spared(request_id) for request_id in ids]
        ids += [ahead_id for ahead_id in late if ahead_id is not None]
        for found in [self.lookaheads.cancel(request_id) for request_id in ids]:
            if found is None:
                continue
            parent, ahead_id = found
            parent.status = finished_status
            self._manager.forget(parent.request_id)
            # the worker never saw the parent, but it may keep the look-ahead's queries for it
            self.finished_req_ids.add(parent.request_id)
            cancelled.append(parent)
            ids.append(ahead_id)
        finished = super().finish_requests(ids, finished_status)
        return cancelled + [r for r in finished if r.request_id not in self.lookaheads]

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        kv_params, other_params = super()._free_request(request, delay_free_blocks)
        if self._answers is not None and request.request_id not in self.lookaheads:
            # of one that is aborted nobody hears
            if request.status != RequestStatus.FINISHED_ABORTED:
                peak_blocks = self._manager.peak_blocks(request.request_id)
                said = self._answers.of(request, self._terms_of(request), peak_blocks)
                kv_params = {**(kv_params or {}), **said}
            self._answers.forget(request.request_id)
        self._manager.forget(request.request_id)
        self._stripped.forget(request.request_id)
        self.lookaheads.forget_spared(request.request_id)
        if request.request_id in self.lookaheads:
            if self.finished_req_ids_dict is not None:
                self.finished_req_ids_dict[request.client_index].discard(request.request_id)
            parent = self.lookaheads.release(request.request_id)
            if parent is not None:
                super().add_request(parent)
        return kv_params, other_params

    def _follow(self, outputs: Iterable[EngineCoreOutput], answers: Answers) -> None:
        """Send along with a first token what a front end may have to say at a stop string.

        And with the second where what stays of a prompt is chosen behind the first.
        """
        for output in outputs:
            request = self.requests.get(output.request_id)
            if output.finish_reason is not None or request is None or not answers.may_stop(request):
                continue
            peak_blocks = self._manager.peak_blocks(request.request_id)
            said = answers.of(request, self._terms_of(request), peak_blocks, goes_on=True)
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), **said}

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self._answers is not None:
            self._answers.note(model_runner_output, self.requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            of_client.outputs = [
                output for output in of_client.outputs if output.request_id not in self.lookaheads
            ]
            if self._answers is not None:
                self._follow(of_client.outputs, self._answers)
        self.lookaheads.forget_gone(self.requests)
        return outputs
