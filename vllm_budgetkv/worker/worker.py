"""The worker: vLLM's, with our backend while it loads and our cache around every step."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_budgetkv.cache.build import build_cache
from vllm_budgetkv.cache.probe.rotaries import find_rotaries, turns_probe
from vllm_budgetkv.cache.rehearsal import rehearse
from vllm_budgetkv.cache.rules import Arrival, Offer, Rules
from vllm_budgetkv.policy import make_policy
from vllm_budgetkv.scheduler.lookahead import LookaheadParams, parent_of
from vllm_budgetkv.scheduler.spec import our_group, windows_of
from vllm_budgetkv.scheduler.stripped import brought_by
from vllm_budgetkv.start import layer_kinds, platforms, pool_size, refused_models
from vllm_budgetkv.start.activation import config_of, rules_of
from vllm_budgetkv.start.host_memory import num_blocks
from vllm_budgetkv.worker.backend import BudgetBackend, layers_under_quota
from vllm_budgetkv.worker.engine_view import heads_of, model_of
from vllm_budgetkv.worker.generators import rest_in_chunks
from vllm_budgetkv.worker.graphs import keep_chunks_out
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder
from vllm_budgetkv.worker.noted_rows import NotedRows
from vllm_budgetkv.worker.padded_values import chosen_as_others
from vllm_budgetkv.worker.query_samples import NUM_TOKEN_IDS, sample_queries
from vllm_budgetkv.worker.telling import tell
from vllm_budgetkv.worker.video_encoder import VideoEncoder
from vllm_budgetkv.worker.window_blocks import WindowBlocks
from vllm_budgetkv.worker.windows import windows_left_to_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
    from vllm.v1.worker.worker_base import CompilationTimes

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.cache import BudgetCache
    from vllm_budgetkv.cache.probe.bank import Rotary
    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.request_rules import RequestRules

BACKEND_PATH = f"{BudgetBackend.__module__}.{BudgetBackend.__qualname__}"


@contextmanager
def backend_registered() -> Iterator[None]:
    """Let the model find our backend, and only the model that is loaded inside."""
    _cached_get_attn_backend.cache_clear()
    if BudgetBackend.get_name() not in AttentionBackendEnum.__members__:
        # a layer looks its backend up by name; the name alone selects nothing
        register_backend(BudgetBackend.get_name(), BACKEND_PATH)
    slot = AttentionBackendEnum[platforms.current().backend_slot]
    register_backend(slot, BACKEND_PATH)
    try:
        yield
    finally:
        slot.clear_override()
        _cached_get_attn_backend.cache_clear()


class BudgetWorker(Worker):
    """vLLM's worker, whose requests stay inside their quota.

    Attributes:
        budget_config: the options, from `load_model` on.
        budget_rules: what requests are held to, from `load_model` on.
        budget_cache: the cache, once vLLM has allocated its buffer.
        noted_rows: requests of the rows of a batch, where its metadata name none.
        video_encoder: of videos in groups of frames; None where each is computed as a whole.
        window_blocks: clears blocks of layers with windows; None without such layers.
    """

    budget_config: BudgetConfig
    budget_rules: RequestRules
    budget_cache: BudgetCache
    noted_rows: NotedRows
    video_encoder: VideoEncoder | None = None
    window_blocks: WindowBlocks | None

    def load_model(self, **kwargs: Any) -> None:
        self.budget_config = config_of(self.vllm_config)
        self.budget_rules = rules_of(self.vllm_config)
        BudgetBackend.quota = self._largest_quota
        BudgetBackend.computed = self.model_config.dtype
        BudgetBackend.pads_values = layer_kinds.pads_values(self.model_config)
        keeps_windows = refused_models.keeps_windows(self.vllm_config.model_config)
        with (
            backend_registered(),
            windows_left_to_vllm(self.vllm_config, keeps_windows),
            chosen_as_others(self.model_config),
        ):
            super().load_model(**kwargs)
        self.video_encoder = VideoEncoder.of(self.model_runner, self.vllm_config)

    @property
    def _largest_quota(self) -> Quota:
        """Of requests under the server's policy."""
        return self.budget_rules.largest(self.budget_config.policy)

    @property
    def _speaks(self) -> bool:
        """Whether this worker speaks for all: vLLM reads the steps of the last stage's first."""
        parallel = self.vllm_config.parallel_config
        return self.rank == parallel.world_size - parallel.tensor_parallel_size

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        model = self.vllm_config.model_config
        names = layers_under_quota(
            specs,
            may_keep_state=refused_models.keeps_state(model),
            may_keep_windows=refused_models.keeps_windows(model),
        )
        context = self.vllm_config.compilation_config.static_forward_context
        heads_of({name: context[name] for name in names}, self._largest_quota)
        if self.video_encoder is not None:
            for name in names:
                specs[name] = replace(specs[name], encoder_tokens=self.video_encoder.tokens)
        return specs

    def determine_available_memory(self) -> int:
        encoder = self.video_encoder
        with encoder.tried(self.use_v2_model_runner) if encoder else nullcontext():
            pool_bytes = super().determine_available_memory()
        if self._largest_quota.compresses:
            windows = windows_of(self.get_kv_cache_spec().values(), self.vllm_config)
            pool_size.check(self.vllm_config, self._largest_quota, pool_bytes, windows=windows)
        return pool_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        group = our_group(kv_cache_config)
        names = kv_cache_config.kv_cache_groups[group].layer_names
        context = self.vllm_config.compilation_config.static_forward_context
        self.budget_cache = self._make_cache({name: context[name] for name in names}, group)
        for name in names:
            context[name].impl.cache = self.budget_cache
        for attn_group in self.model_runner.attn_groups[group]:
            builder = attn_group.get_metadata_builder()
            assert isinstance(builder, BudgetMetadataBuilder)
            builder.bind(self.budget_cache, self._row_ids)
        self.window_blocks = None
        if refused_models.keeps_windows(self.model_config):
            raw = self.budget_cache.layers.tables.pool.raw
            self.window_blocks = WindowBlocks.of(raw, kv_cache_config)
        self.noted_rows = NotedRows()
        if self.use_v2_model_runner and self.model_config.is_hybrid:
            self.noted_rows.watch(self.model_runner)
        keep_chunks_out(self.model_runner, self.budget_cache, self.use_v2_model_runner)
        rest_in_chunks(self.model_runner, self.use_v2_model_runner)
        self.model_runner.get_model().register_forward_pre_hook(
            self.see_positions, with_kwargs=True
        )

    def _make_cache(self, layers: Mapping[str, Any], group: int) -> BudgetCache:
        config = self.budget_config
        offers = [self._offer(name) for name in config.policies]
        model = model_of(layers, self._largest_quota, group, self.model_config.dtype)
        if any(offer.compresses and turns_probe(offer.policy) for offer in offers):
            model = replace(model, rotaries=self._find_rotaries(model.layer_index))
        report, trace = (
            Path(name) if name and self._speaks else None
            for name in (config.report_file, config.trace_file)
        )
        return build_cache(
            model,
            Rules(
                offers=offers,
                options=config.policy_options(),
                num_slots=self.vllm_config.scheduler_config.max_num_seqs,
                check_ledger=config.check_ledger,
                max_model_tokens=self.model_config.max_model_len,
                host_blocks=num_blocks(self.vllm_config, config),
                summarizes=config.answer_report and self._speaks,
            ),
            self._arrival_of,
            (lambda record: record.append_to(report)) if report else None,
            trace,
        )

    def _offer(self, name: str) -> Offer:
        terms, options = self.budget_rules.under(name), self.budget_config.of_policy(name)
        policy = make_policy(name, options.policy_options(), terms.quota.page_tokens)
        return Offer(policy, terms, self.budget_rules.largest(name))

    def _arrival_of(self, new: NewRequestData) -> Arrival:
        """What a new request is held to; the engine core has found that it may be."""
        params = new.sampling_params
        asked = None if params is None else params.extra_args
        prompt_tokens = new.prompt_len
        if isinstance(params, LookaheadParams):
            prompt_tokens = params.parent_prompt_tokens
        return Arrival(self.budget_rules.of(asked, prompt_tokens), parent_of(new))

    def _find_rotaries(self, layer_index: Mapping[str, int]) -> dict[int, Rotary]:
        max_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        return find_rotaries(
            self.model_runner.get_model(),
            self.model_config.hf_text_config,
            partial(sample_queries, self.model_runner, self.vllm_config),
            max_model_tokens=self.model_config.max_model_len,
            max_sample_positions=max_tokens // NUM_TOKEN_IDS,
            layer_index=layer_index,
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # what warms up, vLLM's own requests too, is no client's
        with self.budget_cache.reports.paused():
            if self.budget_cache.compiles:
                rehearse(self.budget_cache)
            return super().compile_or_warm_up_model()

    def _row_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """Request id of each row of the batch that the runner is preparing."""
        if self.use_v2_model_runner:
            index_to_id = self.model_runner.req_states.index_to_req_id
            # rows beyond the scheduled requests pad the batch to the size of a graph
            num_rows = len(self.budget_cache.plans)
            if common.req_idx is None:
                return self.noted_rows.ids[:num_rows]
            indices = common.req_idx[:num_rows]
            return [index_to_id[int(index)] for index in indices]
        return self.model_runner.input_batch.req_ids[: common.num_reqs]

    def see_positions(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        step = self.budget_cache.step
        if step is not None:
            step.see_positions(kwargs["positions"])

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        brings = brought_by(scheduler_output)
        if brings is not None and not self.use_v2_model_runner:
            # runner V2 is sent anew what comes back
            brings.give_to(self.model_runner.requests)
        self.budget_cache.begin_step(scheduler_output)
        if self.window_blocks is not None:
            self.window_blocks.clear(scheduler_output)
        output = super().execute_model(scheduler_output)
        self.budget_cache.end_step()
        return output

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        output = super().sample_tokens(grammar_output)
        counted = self.budget_cache.reports.take()
        return output if counted is None else tell(output, counted)
