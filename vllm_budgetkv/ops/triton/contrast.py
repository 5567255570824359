"""`contrast` in Triton: one launch adds up directions, one compares every key with their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages
from vllm_budgetkv.ops.triton.heads import Heads

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads

# short runs fill the card with the few heads of one layer
MIN_RUN_TOKENS = 64
MAX_RUNS = 64
BLOCK_TOKENS = 32
BLOCK_RUNS = tl.constexpr(16)
# of a norm, as in torch.nn.functional.normalize: a zero key has no direction
MIN_NORM = tl.constexpr(1e-12)


def contrast(heads: PagedHeads, max_tokens: int) -> torch.Tensor:
    """See `vllm_budgetkv.ops.contrast.contrast`."""
    num_heads, layout = heads.num_heads, heads.pool.layout
    found = heads.table.new_empty(num_heads, max_tokens, dtype=torch.float32)
    if found.numel() == 0:
        return found
    run = max(MIN_RUN_TOKENS, triton.next_power_of_2(triton.cdiv(max_tokens, MAX_RUNS)))
    num_runs = triton.cdiv(max_tokens, run)
    sums = found.new_empty(num_heads, num_runs, layout.head_size)
    source = (Pages.of(heads.pool), Heads.of(heads), sums)
    sizes = {
        "RUN_TOKENS": run,
        "PAGE_TOKENS": layout.page_tokens,
        "HEAD_SIZE": layout.head_size,
        "BLOCK_SIZE": triton.next_power_of_2(layout.head_size),
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "num_warps": 4,
    }
    sum_kernel[(num_runs, num_heads)](*source, max_tokens, **sizes)
    compare_kernel[(num_runs, num_heads)](*source, found, max_tokens, **sizes)
    return found


@triton.jit
def sum_kernel(
    pages: tl.tuple,
    heads: tl.tuple,
    sums: tl.tensor,
    max_tokens: tl.tensor,
    RUN_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs, H]: the sum of the normalised keys of a run, in `sums` [H, runs, D]."""
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_keys = tl.minimum(tl.load(heads.lens + head * heads.lens_stride), max_tokens)
    channel, total = tl.arange(0, BLOCK_SIZE), tl.zeros([BLOCK_SIZE], tl.float32)
    stop = tl.minimum((run + 1) * RUN_TOKENS, num_keys)
    for first in range(run * RUN_TOKENS, stop, BLOCK_TOKENS):
        index = first + tl.arange(0, BLOCK_TOKENS)
        tile = _directions(pages, heads, head, index, num_keys, PAGE_TOKENS, HEAD_SIZE, channel)
        total += tl.sum(tile, 0)
    row = head * tl.num_programs(0) + run
    tl.store(sums + row * HEAD_SIZE + channel, total, mask=channel < HEAD_SIZE)


@triton.jit
def compare_kernel(
    pages: tl.tuple,
    heads: tl.tuple,
    sums: tl.tensor,
    found: tl.tensor,
    max_tokens: tl.tensor,
    RUN_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs, H]: 1 minus the cosine of every key of a run with the sum of all runs."""
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_keys = tl.minimum(tl.load(heads.lens + head * heads.lens_stride), max_tokens)
    channel, anchor = tl.arange(0, BLOCK_SIZE), tl.zeros([BLOCK_SIZE], tl.float32)
    num_runs = tl.num_programs(0)
    for first in range(0, num_runs, BLOCK_RUNS):
        other = first + tl.arange(0, BLOCK_RUNS)
        row = (head * num_runs + other)[:, None] * HEAD_SIZE
        mask = (other < num_runs)[:, None] & (channel < HEAD_SIZE)[None, :]
        anchor += tl.sum(tl.load(sums + row + channel[None, :], mask=mask, other=0.0), 0)
    anchor /= tl.maximum(tl.sqrt_rn(tl.sum(anchor * anchor)), MIN_NORM)

    stop = tl.minimum((run + 1) * RUN_TOKENS, max_tokens)
    for first in range(run * RUN_TOKENS, stop, BLOCK_TOKENS):
        index = first + tl.arange(0, BLOCK_TOKENS)
        tile = _directions(pages, heads, head, index, num_keys, PAGE_TOKENS, HEAD_SIZE, channel)
        differences = 1.0 - tl.sum(tile * anchor[None, :], 1)
        target = found + head * max_tokens + index
        tl.store(target, tl.where(index < num_keys, differences, 0.0), mask=index < stop)


@triton.jit
def _directions(
    pages: tl.tuple,
    heads: tl.tuple,
    head: tl.tensor,
    index: tl.tensor,
    num_keys: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    channel: tl.tensor,
) -> tl.tensor:
    """float32 [tokens, channels]: the keys at `index` with length 1; 0 behind the last key."""
    held = index < num_keys
    entries = heads.table + head * heads.stride + index // PAGE_TOKENS
    page = tl.load(entries, mask=held, other=0).to(tl.int64)
    where = page * pages.stride + index % PAGE_TOKENS * HEAD_SIZE
    mask = held[:, None] & (channel < HEAD_SIZE)[None, :]
    keys = tl.load(pages.key + where[:, None] + channel[None, :], mask=mask, other=0.0)
    keys = keys.to(tl.float32)
    norms = tl.maximum(tl.sqrt_rn(tl.sum(keys * keys, 1)), MIN_NORM)
    return keys / norms[:, None]
