"""Reference of `append`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.layout import PagePool


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    pool: PagePool,
    table: torch.Tensor,
    lens: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    first_position: torch.Tensor,
    shared: torch.Tensor,
) -> None:
    """See `vllm_budgetkv.ops.append.append`."""
    page_tokens = pool.layout.page_tokens
    for row, slot in enumerate(slots.tolist()):
        start, end = query_start[row : row + 2].tolist()
        if start == end:
            continue
        for head in range(table.shape[1]):
            held = int(lens[slot, head])
            index = torch.arange(held, held + end - start, device=table.device)
            if shared[row]:
                take_pages(table, free_pages, num_free, slot, head, held, end - start, page_tokens)
            pages = table[slot, head, index // page_tokens].long()
            offsets = index % page_tokens
            pool.keys[pages, offsets] = key[start:end, head]
            pool.values[pages, offsets] = value[start:end, head]
            pool.positions[pages, offsets] = first_position[row] + (index - held).int()
            pool.scores[pages, offsets] = 0.0
            lens[slot, head] += end - start


def take_pages(
    table: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    slot: int,
    head: int,
    held_tokens: int,
    new_tokens: int,
    page_tokens: int,
) -> None:
    """Pop the pages that one head needs for its new tokens, in ascending order."""
    first = -(-held_tokens // page_tokens)
    end = -(-(held_tokens + new_tokens) // page_tokens)
    if end - first > num_free[slot]:
        raise RuntimeError(
            f"slot {slot} head {head} wants {end - first} pages, but "
            f"{int(num_free[slot])} are free: compress the request before it grows, "
            "or raise its quota"
        )
    for page in range(first, end):
        num_free[slot] -= 1
        table[slot, head, page] = free_pages[slot, num_free[slot]]
