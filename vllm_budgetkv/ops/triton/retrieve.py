"""`retrieve` in Triton: one launch scores the pages' boxes, one chooses and lists the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, require_dense
from vllm_budgetkv.ops.triton.ranking import HIGHEST_KEY, LOWEST_KEY, largest_key, sort_key
from vllm_budgetkv.ops.triton.scratch import scratch

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, PageChoice, PagedHeads

BLOCK_PAGES = 32


def retrieve(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    dynamic: torch.Tensor,
    choice: PageChoice,
    out: PagedHeads,
) -> None:
    """See `vllm_budgetkv.ops.retrieve.retrieve`."""
    num_rows, num_heads, width_pages = out.table.shape
    if num_rows == 0 or width_pages == 0:
        return
    slots, layout, group = rows.slots, heads.pool.layout, query.shape[1] // num_heads
    require_dense(slots=slots, dynamic=dynamic)
    tables = Tables.of(heads)
    scores = scratch("page scores", (num_rows, num_heads, width_pages), query)
    box_kernel[(triton.cdiv(width_pages, BLOCK_PAGES), num_heads, num_rows)](
        Tokens.of(query),
        Pages.of(heads.pool),
        tables,
        slots,
        scores,
        width_pages,
        GROUP=group,
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_PAGES=BLOCK_PAGES,
    )
    choose_kernel[(num_rows, num_heads)](
        tables,
        slots,
        dynamic,
        dynamic.stride(0),
        scores,
        Tables.of(out),
        width_pages,
        choice.sink_pages,
        choice.window_pages,
        KEEP_RATIO=choice.keep_ratio,
        PAGE_TOKENS=layout.page_tokens,
        BLOCK_WIDTH=triton.next_power_of_2(width_pages),
    )


@triton.jit
def box_kernel(
    query: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    slots: tl.tensor,
    scores: tl.tensor,
    width_pages: tl.tensor,
    GROUP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
) -> None:
    """Grid [page blocks, H, R]: the largest q.k in each page's box, for the best of the group.

    The largest of q * (c - r) and q * (c + r) is q * c + |q| * r, as no radius is negative.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    num_tokens = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    num_pages = tl.cdiv(num_tokens, PAGE_TOKENS)
    if tl.program_id(0) * BLOCK_PAGES >= num_pages:
        return
    entry = tl.program_id(0) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride + entry
    page = tl.load(entries, mask=entry < num_pages, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK_SIZE)
    mask = (entry < num_pages)[:, None] & (channel < HEAD_SIZE)[None, :]
    digest = pages.digest + page[:, None] * pages.digest_stride + channel[None, :]
    centre = tl.load(digest, mask=mask, other=0.0).to(tl.float32)
    radius = tl.load(digest + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32)
    best = tl.full([BLOCK_PAGES], float("-inf"), tl.float32)
    for member in range(GROUP):
        vector = row.to(tl.int64) * query.stride + (head * GROUP + member) * query.head_stride
        held = tl.load(query.data + vector + channel, mask=channel < HEAD_SIZE, other=0.0)
        asked = held.to(tl.float32)[None, :]
        best = tl.maximum(best, tl.sum(asked * centre + tl.abs(asked) * radius, 1))
    target = (row.to(tl.int64) * tl.num_programs(1) + head) * width_pages + entry
    tl.store(scores + target, best, mask=entry < num_pages)


@triton.jit
def choose_kernel(
    tables: tl.tuple,
    slots: tl.tensor,
    dynamic: tl.tensor,
    dynamic_stride: tl.tensor,
    scores: tl.tensor,
    chosen: tl.tuple,
    width_pages: tl.tensor,
    sink_pages: tl.tensor,
    window_pages: tl.tensor,
    KEEP_RATIO: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Grid [R, H]: lists the best pages of a dynamic head, or all pages of another."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    num_tokens = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    num_pages = tl.cdiv(num_tokens, PAGE_TOKENS)
    # in float64, as every other implementation rounds it
    share = num_pages.to(tl.float64) * tl.full([], KEEP_RATIO, tl.float64)
    kept = tl.maximum(tl.ceil(share).to(tl.int32), tl.minimum(num_pages, sink_pages + window_pages))
    is_dynamic = tl.load(dynamic + slot * dynamic_stride + head).to(tl.int32)
    kept = tl.where(is_dynamic != 0, kept, num_pages)

    index = tl.arange(0, BLOCK_WIDTH)
    place = (row * tl.num_programs(1) + head) * width_pages + index
    found = tl.load(scores + place, mask=index < num_pages, other=0.0)
    keys = tl.maximum(sort_key(found), LOWEST_KEY + 1)
    keys = tl.where((index < sink_pages) | (index >= num_pages - window_pages), HIGHEST_KEY, keys)
    keys = tl.where(index < num_pages, keys, LOWEST_KEY)
    bound = largest_key(keys, kept)
    ties = ((keys == bound) & (index < num_pages)).to(tl.int32)
    # of the pages at the bound the last ones: how many of them come after each
    num_ties = kept - tl.sum((keys > bound).to(tl.int32))
    ties_after = tl.sum(ties) - tl.cumsum(ties, 0)
    keep = (keys > bound) | ((ties != 0) & (ties_after < num_ties))

    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride
    page = tl.load(entries + index, mask=keep, other=-1)
    to = chosen.table + row * chosen.slot_stride + head * chosen.head_stride
    tl.store(to + tl.cumsum(keep.to(tl.int32), 0) - 1, page, mask=keep)
    tl.store(
        to + index,
        tl.full([BLOCK_WIDTH], -1, tl.int32),
        mask=(index >= kept) & (index < width_pages),
    )
    kept_tokens = num_tokens - (num_pages - kept) * PAGE_TOKENS
    tl.store(chosen.lens + row * chosen.lens_slot_stride + head, kept_tokens)
