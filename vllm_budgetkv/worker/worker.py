"""The worker: vLLM's, with our backend while it loads and our cache around every step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_budgetkv import platforms
from vllm_budgetkv.activation import config_of, quota_of
from vllm_budgetkv.attention.backend import BudgetBackend
from vllm_budgetkv.attention.builder import BudgetMetadataBuilder
from vllm_budgetkv.scheduler.lookahead import parent_of
from vllm_budgetkv.worker.assemble import make_cache
from vllm_budgetkv.worker.graphs import keep_chunks_out
from vllm_budgetkv.worker.rehearsal import rehearse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.worker_base import CompilationTimes

    from vllm_budgetkv.worker.cache import BudgetCache

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
    """vLLM's worker, whose requests stay inside their quota."""

    budget_cache: BudgetCache

    def load_model(self, **kwargs: Any) -> None:
        self._config = config_of(self.vllm_config)
        self._quota = quota_of(self.vllm_config)
        BudgetBackend.quota = self._quota
        with backend_registered():
            super().load_model(**kwargs)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        (group,) = kv_cache_config.kv_cache_groups
        context = self.vllm_config.compilation_config.static_forward_context
        self.budget_cache = make_cache(
            config=self._config,
            quota=self._quota,
            layers={name: context[name] for name in group.layer_names},
            model=self.model_runner.get_model(),
            max_num_seqs=self.vllm_config.scheduler_config.max_num_seqs,
            parent_of=parent_of,
            writes_report=self.rank == 0,
        )
        for attn_group in self.model_runner.attn_groups[0]:
            builder = attn_group.get_metadata_builder()
            assert isinstance(builder, BudgetMetadataBuilder)
            builder.bind(self.budget_cache, self._row_ids)
        keep_chunks_out(self.model_runner, self.budget_cache, self.use_v2_model_runner)
        self.model_runner.get_model().register_forward_pre_hook(
            self._see_positions, with_kwargs=True
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # what warms up, vLLM's own requests too, is no client's
        self.budget_cache.slots.has_clients = False
        if self.budget_cache.compiles:
            rehearse(self.budget_cache)
        times = super().compile_or_warm_up_model()
        self.budget_cache.slots.has_clients = True
        return times

    def _row_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """Request id of each row of the batch that the runner is preparing."""
        if self.use_v2_model_runner:
            index_to_id = self.model_runner.req_states.index_to_req_id
            # rows beyond the scheduled requests pad the batch to the size of a graph
            indices = common.req_idx[: len(self.budget_cache.plans)]
            return [index_to_id[int(index)] for index in indices]
        return self.model_runner.input_batch.req_ids[: common.num_reqs]

    def _see_positions(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        step = self.budget_cache.step
        if step is not None:
            step.see_positions(kwargs["positions"])

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.budget_cache.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self.budget_cache.end_step()
        return output
