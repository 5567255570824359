"""When a request has its next turn: with stages, steps are scheduled while others are under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class TurnScheduler(AsyncScheduler):
    """`AsyncScheduler`, but with stages it is vLLM's other one where that is asked for.

    It gives a request its next turn ahead of its token, which the worker has. Without asynchronous
    scheduling the engine core sends tokens to the workers. While each step was followed by its
    output, that made no difference; with steps under way a request must sit out until its token is
    there.
    """

    @property
    def _waits_for_tokens(self) -> bool:
        return self.use_pp and not self.scheduler_config.async_scheduling

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self._waits_for_tokens:
            Scheduler._update_after_schedule(self, scheduler_output)
        else:
            super()._update_after_schedule(scheduler_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        if self._waits_for_tokens:
            return Scheduler._update_request_with_output(self, request, new_token_ids, is_stale)
        return super()._update_request_with_output(request, new_token_ids, is_stale)
