"""Which batches vLLM may replay from a CUDA graph: those whose requests all decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_budgetkv.worker.cache import BudgetCache


def keep_chunks_out(runner: Any, cache: BudgetCache, is_v2: bool) -> None:
    """Let no graph serve the prompt tokens of a chunk, however few they are.

    Both of vLLM's model runners take a batch for a decode if every request has one token. But the
    last token of a prompt may be a chunk of its own, and a graph, which only replays kernels,
    would neither compress behind it nor keep its query for the probe.

    Args:
        runner: vLLM's model runner of this worker; mutated.
        cache: knows what the requests of the current step do.
        is_v2: which of the two runners it is.
    """
    if is_v2:
        gather = runner.gather_batch_req_state

        def gather_batch_req_state(*args: Any, **kwargs: Any) -> tuple[Any, int | None]:
            state, uniform_tokens = gather(*args, **kwargs)
            return state, None if cache.has_chunks else uniform_tokens

        runner.gather_batch_req_state = gather_batch_req_state
        return
    is_uniform = runner._is_uniform_decode

    def is_uniform_decode(*args: Any, **kwargs: Any) -> bool:
        return not cache.has_chunks and is_uniform(*args, **kwargs)

    runner._is_uniform_decode = is_uniform_decode
