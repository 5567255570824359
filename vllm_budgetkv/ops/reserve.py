"""`reserve`: the pages that the next token of every head needs, for all layers at once."""

from __future__ import annotations

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.reserve import reserve as reserve_reference
from vllm_budgetkv.ops.require import require


def reserve(
    table: torch.Tensor,
    lens: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    slots: torch.Tensor,
    shared: torch.Tensor,
    page_tokens: int,
) -> None:
    """Enter the page of one more token in the table of every head whose last page is full.

    Once before the layers of a decode step: `append` then finds every page in its table, so that
    its rows are no longer shared ones and no layer waits for a free stack. A shared row takes the
    pages from the top of its free stack, heads ascending; other rows have theirs and are left as
    they are. Lengths do not change.

    Args:
        table: int32 [S, H, W]; H may be the heads of all layers; mutated.
        lens: int32 [S, H].
        free_pages: int32 [S, F].
        num_free: int32 [S]; mutated.
        slots: int32 [R].
        shared: bool [R].
        page_tokens: tokens of a page (N).

    Raises:
        ValueError: a shape, dtype or number does not fit.
        RuntimeError: a free stack runs out. Tables are then partly updated.
        IndexError: a slot or the table width is out of range.
    """
    num_slots, num_heads = lens.shape
    require("table", table, torch.int32, (num_slots, num_heads, None))
    require("lens", lens, torch.int32, (None, None))
    require("free_pages", free_pages, torch.int32, (num_slots, None))
    require("num_free", num_free, torch.int32, (num_slots,))
    require("slots", slots, torch.int32, (None,))
    require("shared", shared, torch.bool, (slots.shape[0],))
    if page_tokens < 1:
        raise ValueError(f"page_tokens is {page_tokens}; it must be at least 1")
    arguments = (table, lens, free_pages, num_free, slots, shared, page_tokens)
    match backend.of(table):
        case "reference":
            reserve_reference(*arguments)
        case "triton":
            from vllm_budgetkv.ops.triton.reserve import reserve as reserve_triton

            reserve_triton(*arguments)
        case "cpp":
            extension.load()
            torch.ops.budgetkv.reserve(*arguments)
