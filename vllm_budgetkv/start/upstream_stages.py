"""What the stages of a pipeline touch in vLLM: what they hand on, and when tokens are there."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

_ASYNC = "vllm.v1.core.sched.async_scheduler"

# fmt: off
STAGE_TOUCHPOINTS = (
    Touchpoint(_ASYNC, "AsyncScheduler._update_after_schedule", "override",
               "without asynchronous scheduling a request sits out until its token is there",
               ("self", "scheduler_output")),
    Touchpoint(_ASYNC, "AsyncScheduler._update_request_with_output", "override", "the same",
               ("self", "request", "new_token_ids", "is_stale")),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler._update_after_schedule", "read",
               "what is done instead",
               ("self", "scheduler_output")),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler._update_request_with_output", "read",
               "the same",
               ("self", "request", "new_token_ids", "is_stale")),
    Touchpoint("vllm.config", "CompilationMode", "read",
               "an eager stage of model runner V1 on a CPU is refused at start"),
    Touchpoint("vllm.v1.worker.gpu_model_runner",
               "GPUModelRunner.sync_and_gather_intermediate_tensors", "read",
               "the same: it asserts the tensors that only a trial run has made (runner V1)",
               ("self", "num_tokens", "intermediate_tensors", "sync_self")),
    Touchpoint("vllm.distributed.parallel_state", "get_pp_group", "read",
               "whether queries are sampled from tokens or from what a stage before hands on", ()),
    Touchpoint("vllm.distributed.parallel_state", "GroupCoordinator.is_first_rank", "read",
               "the same"),
    Touchpoint("vllm.v1.executor.multiproc_executor", "MultiprocExecutor._get_output_rank", "read",
               "the rank whose steps reach the scheduler speaks for all", ("self",)),
)
# fmt: on
