"""Where a layer is compressed while host memory fills it: chunks as large as its quota has room.

In a prefill all layers hold their budget while one holds a chunk more, so a chunk is small. What
host memory keeps is replayed a layer at a time: those behind it hold nothing yet, and their pages
are room for its chunks. With S tokens per head that stay, l layers in front of this one, L in all
and a quota of Q * m pages of N tokens per layer and head, a chunk of t tokens has room when

    (l + 1) * (S + N - 1) + t  <=  L * Q * m * N,

since the pages of a layer's H heads are at most H * (S + N - 1) / N. The last layer has room for
the chunk of a prefill, the first for most of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_budgetkv.arithmetic.quota import Quota


def replay_stops(
    quota: Quota, layer: int, stops: Sequence[int], joined_tokens: int
) -> Iterator[int]:
    """Where the chunks of one layer end. A function of its arguments alone, as all chunks are.

    Args:
        quota: of the request.
        layer: its index, which is how many layers are filled already.
        stops: where the chunks of a prefill would end, ascending.
        joined_tokens: chunks that end there or before are joined, as far as there is room; those
            behind it stay.
    """
    joined = [stop for stop in stops if stop <= joined_tokens]
    if joined:
        first_tokens, later_tokens = most_chunk_tokens(quota, layer)
        num_later = ceil_div(max(0, joined[-1] - first_tokens), later_tokens)
        # the first takes what is left over
        yield from range(joined[-1] - num_later * later_tokens, joined[-1] + 1, later_tokens)
    yield from stops[len(joined) :]


def most_chunk_tokens(quota: Quota, layer: int) -> tuple[int, int]:
    """Most tokens of the first chunk of a layer, which finds it empty, and of those behind it."""
    kept_tokens = quota.budget_tokens + quota.pinned_tokens
    filled_tokens = (layer + 1) * (kept_tokens + quota.page_tokens - 1)
    room_tokens = quota.num_layers * quota.tokens - filled_tokens
    width_tokens = quota.table_width_pages * quota.page_tokens
    first_tokens = min(room_tokens + kept_tokens, width_tokens)
    return first_tokens, min(room_tokens, width_tokens - quota.max_head_tokens)
