"""The look-ahead: the text of a long prompt runs before it, so that its question is known early.

Prompts put the question after the video. When the first chunks are cut, only the template has been
seen, and no score can tell which frame will matter. The engine knows the whole prompt, though: its
last text tokens run alone as an internal request, the worker keeps their queries as the first
content of the probe bank, and the real request starts then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.multimodal.inputs import MultiModalFeatureSpec

SUFFIX = "#kv-lookahead"


def lookahead_id(request_id: str) -> str:
    """Id of the internal request that runs ahead of `request_id`."""
    return request_id + SUFFIX


def parent_of(request_id: str) -> str | None:
    """Id of the request that `request_id` runs ahead of; None for a client's request."""
    return request_id.removesuffix(SUFFIX) if request_id.endswith(SUFFIX) else None


def text_tokens(
    prompt_token_ids: Sequence[int],
    features: Sequence[MultiModalFeatureSpec],
    limit_tokens: int,
    enough_tokens: int,
) -> list[int]:
    """The last prompt tokens outside every multimodal item, in order.

    Args:
        prompt_token_ids: of the whole prompt.
        features: its multimodal items.
        limit_tokens: most tokens.
        enough_tokens: text in front of an item is left out once so many stand behind it.
    """
    text: list[int] = []
    stop = len(prompt_token_ids)
    for feature in sorted(features, key=lambda f: f.mm_position.offset, reverse=True):
        item = feature.mm_position
        text[:0] = prompt_token_ids[item.offset + item.length : stop]
        stop = item.offset
        if len(text) >= min(enough_tokens, limit_tokens):
            break
    else:
        text[:0] = prompt_token_ids[:stop]
    return text[-limit_tokens:]


def make_lookahead(parent: Request, limit_tokens: int, enough_tokens: int) -> Request | None:
    """The internal request of `parent`; None when the prompt has no text to run.

    Args:
        parent: a client's request.
        limit_tokens, enough_tokens: see `text_tokens`.
    """
    if parent.prompt_token_ids is None or parent.resumable:
        return None
    prompt = text_tokens(parent.prompt_token_ids, parent.mm_features, limit_tokens, enough_tokens)
    if not prompt:
        return None
    request = Request(
        request_id=lookahead_id(parent.request_id),
        client_index=parent.client_index,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
        pooling_params=None,
        arrival_time=parent.arrival_time,
        lora_request=parent.lora_request,
        priority=parent.priority,
    )
    # its blocks hold other positions than the parent's, so they are no prefix of anything
    request.skip_reading_prefix_cache = True
    return request
