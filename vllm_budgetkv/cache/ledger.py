"""The ledger: every head-page of a request is held by exactly one head or free, none beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.cache.tables import NO_PAGE, HeadTables

if TYPE_CHECKING:
    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.requests import RequestState


def held_pages(tables: HeadTables, slot: int) -> torch.Tensor:
    """int32 [M]: every head-page that the heads of a slot hold."""
    page_tokens = tables.pool.layout.page_tokens
    num_pages = (tables.lens[slot] + page_tokens - 1) // page_tokens
    column = torch.arange(tables.page_table.shape[-1], device=num_pages.device)
    return tables.page_table[slot][column < num_pages[..., None]]


def recall_pages(tables: HeadTables, recaller: Recaller, slot: int) -> torch.Tensor:
    """int32 [M]: the pages of a slot's index, and those for recalled tokens that none uses."""
    page_tokens = tables.pool.layout.page_tokens
    slots, index = recaller.slots[slot], recaller.index[slot]
    column = torch.arange(slots.shape[-1], device=slots.device)
    idle = slots[column >= (recaller.num_recalled[slot] // page_tokens)[..., None]]
    pages = torch.cat((index.flatten(), idle))
    return pages[pages != NO_PAGE]


def check_slot(tables: HeadTables, request: RequestState, recaller: Recaller | None = None) -> None:
    """Check the tables of one request against the blocks that it holds.

    Raises:
        RuntimeError: more blocks than the quota, or a head-page lost, foreign or held twice.
    """
    slot, blocks, quota_blocks = request.slot, request.blocks, request.quota.blocks
    if len(blocks) > quota_blocks:
        raise RuntimeError(f"slot {slot} holds {len(blocks)} blocks, its quota is {quota_blocks}")
    held = held_pages(tables, slot)
    if (held == NO_PAGE).any():
        raise RuntimeError(f"slot {slot}: a head is longer than its page table")
    owned = tables.pages_of(blocks).flatten()
    if not request.shared:
        if not torch.isin(held, owned).all() or held.unique().numel() != held.numel():
            raise RuntimeError(f"slot {slot}: a head holds a page that is not its own")
        return
    free = tables.free_pages[slot, : int(tables.num_free[slot])]
    if recaller is not None:
        held = torch.cat([held, recall_pages(tables, recaller, slot)])
    found = torch.cat([held, free]).sort().values
    if not torch.equal(found, owned.sort().values):
        raise RuntimeError(
            f"slot {slot}: {held.numel()} pages held and {free.numel()} free are not the "
            f"{owned.numel()} pages of its {len(blocks)} blocks (lost, foreign or held twice)"
        )
    column = torch.arange(tables.page_table.shape[-1], device=held.device)
    page_tokens = tables.pool.layout.page_tokens
    beyond = column >= ((tables.lens[slot] + page_tokens - 1) // page_tokens)[..., None]
    if (tables.page_table[slot][beyond] != NO_PAGE).any():
        raise RuntimeError(f"slot {slot}: a page id stands behind the end of a head")
