"""Requests with a seed on a CPU: a chunk of a prompt takes nothing from their random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import upstream

if TYPE_CHECKING:
    from collections.abc import Callable


def rest_in_chunks(runner: Any, is_v2: bool) -> None:
    """Let the generator of a request rest until its prompt is done.

    vLLM's model runner V1 samples behind every chunk, throws the token away and turns the
    generator back by the offset that a GPU's has. A CPU's has none, so the engine dies. Here the
    rows whose token is thrown away have no generator while the runner samples: a seed gives the
    tokens that it gives a prompt in one piece. Runner V2 keeps no generators; it hashes the seed
    with the position. On a GPU vLLM's own way stays.

    Args:
        runner: vLLM's model runner of this worker; mutated.
        is_v2: which of the two runners it is.
    """
    if is_v2 or runner.device.type != "cpu":
        return

    def sample(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # the sampler is given this very dict
        generators = runner.input_batch.generators
        is_discarded = runner.discard_request_mask.np
        resting = {row: generators.pop(row) for row in [*generators] if is_discarded[row]}
        try:
            return original(*args, **kwargs)
        finally:
            generators.update(resting)

    upstream.replace_in(runner, "GPUModelRunner.sample_tokens", sample)
