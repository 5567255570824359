"""Where the next chunk of a prompt that is compressed ends: the request alone decides.

Each chunk is compressed, so the answer hangs on where it ends. vLLM cuts a chunk by what is left
of the batch and of the encoder in that step; here such a chunk waits for a step with more room.
What no step has room for is cut at the start of an item, whoever else is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.pictures import whole_stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.arithmetic.quota import Quota


@dataclass(frozen=True)
class EncoderLimits:
    """What the vision encoder takes in a step of which one request has all.

    Args:
        embeds: most embeddings that it makes and that its cache holds.
        keeps_items_whole: whether a chunk may not end inside an item that begins in it.
    """

    embeds: int
    keeps_items_whole: bool


def must_be_whole(request: Request, quota: Quota, start_tokens: int) -> bool:
    """Whether the chunk behind `start_tokens` may end at its stop and nowhere before."""
    in_prompt = start_tokens < request.num_prompt_tokens
    return in_prompt and quota.compresses_prompt(request.num_prompt_tokens)


def chunk_stop(
    request: Request,
    quota: Quota,
    start_tokens: int,
    limits: EncoderLimits,
    pictures: Sequence[Range] = (),
) -> int:
    """Where the chunk behind `start_tokens` ends at the latest; further than that, always.

    Args:
        request: whose chunk it is.
        quota: of the request.
        start_tokens: in front of the chunk.
        limits: of the encoder.
        pictures: of the prompt, in which no chunk may end.
    """
    stop = _stop_for_encoder(request, quota, start_tokens, limits)
    return whole_stop(start_tokens, stop, pictures)


def _stop_for_encoder(
    request: Request, quota: Quota, start_tokens: int, limits: EncoderLimits
) -> int:
    """The same, whatever it cuts."""
    stop = quota.next_stop(start_tokens, request.num_prompt_tokens)
    if not must_be_whole(request, quota, start_tokens):
        return stop
    num_embeds, seen = 0, set()
    for feature in request.mm_features:
        item = feature.mm_position
        item_stop = item.offset + item.length
        if item_stop <= start_tokens:
            continue
        if item.offset >= stop:
            break
        if feature.identifier not in seen:
            seen.add(feature.identifier)
            num_embeds += item.get_num_embeds()
        if item.offset <= start_tokens:
            continue
        # a group of frames that is not a video's first begins no item
        is_first_chunk = start_tokens == 0 and getattr(feature, "whole", feature) is not None
        is_cut = limits.keeps_items_whole and item_stop > stop
        if is_first_chunk or is_cut or num_embeds > limits.embeds:
            return item.offset
    return stop
