"""Where the tokens of every head of one request lie in the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


def locate_tokens(
    heads: PagedHeads, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page, slot in the page, and validity of the first `num_tokens` tokens of every head.

    Args:
        heads: of one request.
        num_tokens: n, at most W * N.

    Returns:
        pages: int64 [H, n]; 0 where the table has no page, so that it may index.
        offsets: int64 [H, n], slot in the page.
        held: bool [H, n], False beyond `lens`: mask what is read there, it may be NaN.
    """
    (_, table, lens), page_tokens = heads, heads.page_tokens
    index = torch.arange(num_tokens, device=table.device)
    pages = table[:, index // page_tokens].long().clamp(min=0)
    offsets = (index % page_tokens).expand_as(pages)
    return pages, offsets, index < lens[:, None]


def locate_pages(lens: torch.Tensor, page_tokens: int, width_pages: int) -> torch.Tensor:
    """bool [..., W]: the table entries below ceil(len / N), those that hold tokens.

    Args:
        lens: int32 [...], tokens of each head.
        page_tokens: N.
        width_pages: W.
    """
    held_pages = (lens + page_tokens - 1) // page_tokens
    return torch.arange(width_pages, device=lens.device) < held_pages[..., None]
