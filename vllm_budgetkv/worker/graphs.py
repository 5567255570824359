"""Which batches vLLM may replay from a CUDA graph: those whose requests all decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_budgetkv.cache.cache import BudgetCache


def keep_chunks_out(runner: object, cache: BudgetCache, is_v2: bool) -> None:
    """Let no graph serve the prompt tokens of a chunk, however few they are.

    Both of vLLM's model runners take a batch for a decode if every request has one token. But the
    last token of a prompt may be a chunk of its own, and a graph, which only replays kernels,
    would neither compress behind it nor keep its query for the probe.

    Args:
        runner: vLLM's model runner of this worker; mutated.
        cache: knows what the requests of the current step do.
        is_v2: which of the two runners it is.
    """

    def gather(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, int | None]:
        state, uniform_tokens = original(*args, **kwargs)
        return state, None if cache.has_chunks else uniform_tokens

    def is_uniform(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        return not cache.has_chunks and original(*args, **kwargs)

    if is_v2:
        upstream.replace_in(runner, "GPUModelRunner.gather_batch_req_state", gather)
    else:
        upstream.replace_in(runner, "GPUModelRunner._is_uniform_decode", is_uniform)
