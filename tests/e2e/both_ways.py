"""Stock vLLM on a CPU with pictures whose tokens attend to each other both ways, as on a GPU.

The model runners of 0.32 tell every backend where the pictures of a prompt are, and its attention
for CPUs does not look: it attends to earlier tokens only. Here the rows that lie in a picture are
computed once more, in float64 and plain torch, over keys and values noted down as they are stored.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tests.e2e.devices import ON_GPU

if TYPE_CHECKING:
    from collections.abc import Iterator

# a picture that is cut has tokens to attend to that are not there yet; vLLM cuts one nonetheless
# where a step begins with it, or in it, so that steps have to hold what all requests may ask for
UNCUT = {"disable_chunked_mm_input": True}


class Stored:
    """Keys and values by slot, whatever layout the kernels choose for theirs.

    Args:
        kv_cache: [blocks, kv_heads, block_tokens, 2 * head_dim], of vLLM.
    """

    def __init__(self, kv_cache: torch.Tensor) -> None:
        num_blocks, num_heads, self.block_tokens, double_dim = kv_cache.shape
        num_slots = num_blocks * self.block_tokens
        shape = (2, num_slots, num_heads, double_dim // 2)
        # most of it is never touched, and takes no memory
        self.rows = torch.empty(shape, dtype=kv_cache.dtype)
        self.is_written = torch.zeros(num_slots, dtype=torch.bool)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Note rows, [tokens, kv_heads, head_dim], by their slots, [tokens]; -1 is padding."""
        is_real = slots >= 0
        slots = slots[is_real]
        for rows, told in zip(self.rows, (key, value), strict=True):
            rows[slots] = told[: len(is_real)][is_real]
        self.is_written[slots] = True

    def read(self, block_row: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Keys and values of positions `first` to `last`, [2, positions, kv_heads, head_dim].

        Args:
            block_row: blocks of the request, [blocks].
        """
        places = torch.arange(first, last + 1)
        blocks = block_row[places // self.block_tokens].long()
        slots = blocks * self.block_tokens + places % self.block_tokens
        assert self.is_written[slots].all(), f"{first} to {last}: keys that nobody stored"
        return self.rows[:, slots].double()


class Caches:
    """What is stored in each of vLLM's tensors; layers may share one, but no block of it."""

    def __init__(self) -> None:
        self.stored: dict[tuple[Any, ...], Stored] = {}

    def of(self, kv_cache: torch.Tensor) -> Stored:
        """What is stored in one: a view of it is the same one."""
        name = (kv_cache.data_ptr(), kv_cache.shape)
        if name not in self.stored:
            self.stored[name] = Stored(kv_cache)
        return self.stored[name]


@contextmanager
def both_ways() -> Iterator[None]:
    """Let a stock engine that starts and runs in this process see pictures as they are.

    Layers of ours are of other classes and stay as they are, those with windows included. The
    engine needs `UNCUT`, and ends with an AssertionError where a step cuts a picture.
    """
    if ON_GPU:
        yield
        return
    from vllm.v1.attention.backends import cpu_attn

    impl, builder = cpu_attn.CPUAttentionBackendImpl, cpu_attn.CPUAttentionMetadataBuilder
    build, update, forward = builder.build, impl.do_kv_cache_update, impl.forward
    caches = Caches()

    def build_with_ranges(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, fast_build)
        metadata.mm_prefix_range = common_attn_metadata.mm_req_doc_ranges
        return metadata

    def update_noted(
        self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any
    ) -> None:
        update(self, layer, key, value, kv_cache, slot_mapping)
        if type(self) is impl:
            caches.of(kv_cache).write(key, value, slot_mapping)

    def forward_both(self: Any, layer: Any, query: Any, *rest: Any, **how: Any) -> torch.Tensor:
        found = forward(self, layer, query, *rest, **how)
        if type(self) is impl:
            # as the layers of vLLM call it
            _, _, kv_cache, metadata = rest
            if metadata is not None and metadata.mm_prefix_range:
                # Gemma 4 has another rule
                assert not layer.mm_prefix_clamp_sliding_window
                attend_both(self, query, caches.of(kv_cache), metadata, how["output"])
        return found

    with (
        mock.patch.object(builder, "build", build_with_ranges),
        mock.patch.object(impl, "do_kv_cache_update", update_noted),
        mock.patch.object(impl, "forward", forward_both),
    ):
        yield


def attend_both(
    impl: Any, query: torch.Tensor, stored: Stored, metadata: Any, output: torch.Tensor
) -> None:
    """Overwrite the rows of `output` that lie in a picture.

    Args:
        impl: vLLM's, for the numbers of the layer.
        query: [tokens, heads, head_dim].
        metadata: vLLM's, with `mm_prefix_range`: first and last positions by row of the batch.
        output: of the shape of `query`, or flat in heads. Mutated.

    Raises:
        AssertionError: the step ends in a picture, or the layer has what is not computed here.
    """
    assert impl.alibi_slopes is None and impl.sinks is None and not impl.is_fp8_kv_cache
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for row, ranges in metadata.mm_prefix_range.items():
        num_queries = starts[row + 1] - starts[row]
        offset = lengths[row] - num_queries
        for first, last in ranges:
            if last < offset or first >= lengths[row]:
                continue
            assert last < lengths[row], f"{first} to {last} is cut at {lengths[row]}"
            begin = max(first, offset)
            rows = slice(starts[row] + begin - offset, starts[row] + last + 1 - offset)
            earliest = 0 if impl.sliding_window <= 0 else max(0, begin - impl.sliding_window + 1)
            earliest = min(earliest, first)
            keys, values = stored.read(metadata.block_table[row], earliest, last)
            places = torch.arange(earliest, last + 1)
            allowed = allowed_of(torch.arange(begin, last + 1), places, first, impl.sliding_window)
            found = attend(query[rows], keys, values, allowed, impl.scale, impl.logits_soft_cap)
            output[rows] = found.to(output.dtype).view_as(output[rows])


def allowed_of(
    queries: torch.Tensor, keys: torch.Tensor, first: int, window_tokens: int
) -> torch.Tensor:
    """Which keys each query of a picture that begins at `first` may see, [queries, keys].

    Args:
        queries: positions in the picture.
        keys: positions up to the end of the picture.
        window_tokens: none if it is not positive.
    """
    distance = queries[:, None] - keys[None, :]
    is_near = distance < window_tokens if window_tokens > 0 else torch.ones_like(distance).bool()
    return ((distance >= 0) & is_near) | (keys >= first)[None, :]


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attention of some rows in float64, [rows, heads, head_dim].

    Args:
        query: [rows, heads, head_dim].
        keys: [keys, kv_heads, head_dim], float64; so are `values`.
        allowed: [rows, keys].
        soft_cap: of the logits; 0 for none.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (rows.repeat_interleave(group, dim=1) for rows in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
