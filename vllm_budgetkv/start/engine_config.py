"""What counts need of an engine's configuration: of a running one, or of one that is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig


class EngineConfig(Protocol):
    """The parts of a `VllmConfig` from which every count follows.

    A `VllmConfig` exists where the engine's device is; these four can be made anywhere.
    """

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def parallel_config(self) -> ParallelConfig: ...

    @property
    def cache_config(self) -> CacheConfig: ...

    @property
    def scheduler_config(self) -> SchedulerConfig: ...


def step_tokens(engine: EngineConfig) -> tuple[int, str]:
    """Most tokens that a step schedules, of all requests, and the option that sets them."""
    scheduler = engine.scheduler_config
    if scheduler.max_num_scheduled_tokens is not None:
        # it may be less than what the worker's buffers hold
        return scheduler.max_num_scheduled_tokens, "--max-num-scheduled-tokens"
    return scheduler.max_num_batched_tokens, "--max-num-batched-tokens"
