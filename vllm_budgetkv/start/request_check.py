"""What a request asks for is refused where it arrives, so that its client reads why."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import frame_groups
from vllm_budgetkv.start.pool_size import RESERVED_BLOCKS
from vllm_budgetkv.start.request_rules import own

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest

    from vllm_budgetkv.start.pictures import Pictures
    from vllm_budgetkv.start.request_rules import RequestRules


@cache
def refusal() -> type[ValueError]:
    """The error of a client's mistake: HTTP 400 from a server, a `ValueError` offline."""
    from vllm.exceptions import VLLMValidationError

    class RequestRefused(VLLMValidationError, ValueError):
        """What a request asks for is not to be had."""

    return RequestRefused


def check(rules: RequestRules, vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a request that asks for what this server does not give.

    Args:
        rules: of the engine.
        vllm_config: of the engine.
        request: as the front end passes it on.

    Raises:
        ValueError: names the key, what it may be and what it is.
    """
    params = request.sampling_params
    if params is None or not own(params.extra_args):
        return
    prompt_tokens = prompt_length(request)
    try:
        terms = rules.of(params.extra_args, prompt_tokens)
        if not terms.quota.compresses:
            _check_room(vllm_config, prompt_tokens)
    except ValueError as error:
        raise refusal()(str(error)) from error


def check_items(request: EngineCoreRequest, most_tokens: int) -> None:
    """Refuse a request with an item that the encoder cannot take, where videos may be in groups.

    Args:
        request: as the front end passes it on; those of a session are not cut.
        most_tokens: embeddings of the largest item that vLLM would take.

    Raises:
        ValueError: says how large it is and may be.
    """
    features, in_groups = request.mm_features or (), not request.resumable
    reason = frame_groups.items_refusal(features, most_tokens, in_groups=in_groups, lacks_data=True)
    if reason:
        raise refusal()(reason)


def check_pictures(rules: RequestRules, pictures: Pictures, request: EngineCoreRequest) -> None:
    """Refuse a request with a picture that no chunk holds, where its tokens attend both ways.

    Args:
        rules: of the engine; what it asks for has been found to be given.
        pictures: of the engine.
        request: as the front end passes it on.

    Raises:
        ValueError: says how long it is and may be.
    """
    asked = request.sampling_params.extra_args if request.sampling_params else None
    quota = rules.of(asked, prompt_length(request)).quota
    if reason := pictures.refusal(request.mm_features or (), quota):
        raise refusal()(reason)


def prompt_length(request: Any) -> int:
    """Tokens of a prompt, whether of ids or of embeddings."""
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def _check_room(vllm_config: VllmConfig, prompt_tokens: int) -> None:
    """A request without a quota must fit the pool, which `--max-model-len` may exceed here."""
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if num_blocks is None:
        return
    # vLLM's front end counts the blocks of all the engines that it manages
    num_blocks //= _num_engines(vllm_config.parallel_config)
    most_tokens = (num_blocks - RESERVED_BLOCKS) * vllm_config.cache_config.block_size
    if prompt_tokens >= most_tokens:
        raise ValueError(
            f"kv_policy full: the prompt has {prompt_tokens} tokens, but a request without a quota "
            f"must fit the pool of {most_tokens}: ask for another kv_policy"
        )


def _num_engines(parallel: ParallelConfig) -> int:
    """Engines of data parallelism that this front end manages."""
    if parallel.data_parallel_rank_local is not None:
        return 1
    if parallel.local_engines_only:
        return parallel.data_parallel_size_local
    return parallel.data_parallel_size
