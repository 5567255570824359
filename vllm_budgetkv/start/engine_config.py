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
