"""Reference of `append`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, FreeStack, PagedHeads


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: PagedHeads,
    stack: FreeStack,
    rows: BatchRows,
) -> None:
    """See `vllm_budgetkv.ops.append.append`."""
    pool, table, lens = heads
    page_tokens = heads.page_tokens
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = rows.query_start[row : row + 2].tolist()
        if start == end:
            continue
        for head in range(heads.num_heads):
            held = int(lens[slot, head])
            index = torch.arange(held, held + end - start, device=table.device)
            if rows.shared[row]:
                take_pages(heads, stack, slot, head, end - start)
            pages = table[slot, head, index // page_tokens].long()
            offsets = index % page_tokens
            pool.keys[pages, offsets] = key[start:end, head]
            pool.values[pages, offsets] = value[start:end, head]
            pool.positions[pages, offsets] = rows.first_position[row] + (index - held).int()
            lens[slot, head] += end - start


def take_pages(heads: PagedHeads, stack: FreeStack, slot: int, head: int, new_tokens: int) -> None:
    """Pop the pages that one head needs for its new tokens, in ascending order."""
    free_pages, num_free = stack
    held_tokens = int(heads.lens[slot, head])
    first = -(-held_tokens // heads.page_tokens)
    end = -(-(held_tokens + new_tokens) // heads.page_tokens)
    if end - first > num_free[slot]:
        raise RuntimeError(
            f"slot {slot} head {head} wants {end - first} pages, but "
            f"{int(num_free[slot])} are free: compress the request before it grows, "
            "or raise its quota"
        )
    for page in range(first, end):
        num_free[slot] -= 1
        heads.table[slot, head, page] = free_pages[slot, num_free[slot]]
