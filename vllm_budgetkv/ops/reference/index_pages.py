"""What stands in index pages, for the references: digests, codes of 4 bits, and marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.index_page import WORD_BITS
from vllm_budgetkv.arithmetic.layout import CODES_PER_WORD

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool

CODE_BITS, LEVELS = 4, 16


def read_digest(
    digest: torch.Tensor, num_channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [..., D], step [..., R] and channel [..., R] of index pages' digests [..., 2, D]."""
    mean, rest = digest.float().unbind(-2)
    return mean, rest[..., :num_channels], rest[..., num_channels : 2 * num_channels].long()


def read_codes(pool: PagePool, pages: torch.Tensor, entry_tokens: int) -> torch.Tensor:
    """int64 [p, E, R]: the codes of index pages, int64 [p]."""
    layout = pool.layout
    num_words = layout.index_entries(entry_tokens) * layout.code_words
    words = pool.index_words[pages, :num_words].unflatten(1, (-1, layout.code_words))
    codes = words.long()[..., None] >> CODE_BITS * torch.arange(CODES_PER_WORD, device=words.device)
    return (codes & (LEVELS - 1)).flatten(-2)


def write_codes(pool: PagePool, page: int, codes: torch.Tensor) -> None:
    """Write the first codes [e, R] of an index page, the first channel in the lowest bits."""
    shifts = CODE_BITS * torch.arange(CODES_PER_WORD, device=codes.device)
    words = (codes.unflatten(1, (-1, CODES_PER_WORD)).long() << shifts).sum(dim=-1)
    pool.index_words[page, : words.numel()] = _signed(words).flatten()


def read_marks(pool: PagePool, pages: torch.Tensor, entry_tokens: int) -> torch.Tensor:
    """bool [p, g E]: the marks of index pages, int64 [p]."""
    first, num_tokens = _marks_of(pool, entry_tokens)
    words = pool.index_words[pages, first : first + -(-num_tokens // WORD_BITS)].long()
    bits = words[..., None] >> torch.arange(WORD_BITS, device=words.device) & 1
    return bits.flatten(-2)[..., :num_tokens].bool()


def write_marks(
    pool: PagePool, pages: torch.Tensor, is_held: torch.Tensor, entry_tokens: int
) -> None:
    """Write the marks bool [p, g E] of index pages, the first in the lowest bit of a word."""
    first, num_tokens = _marks_of(pool, entry_tokens)
    bits = torch.nn.functional.pad(is_held.long(), (0, -num_tokens % WORD_BITS))
    groups = bits.unflatten(1, (-1, WORD_BITS))
    words = (groups << torch.arange(WORD_BITS, device=bits.device)).sum(dim=-1)
    pool.index_words[pages, first : first + words.shape[1]] = _signed(words)


def _marks_of(pool: PagePool, entry_tokens: int) -> tuple[int, int]:
    """First word of the marks of an index page, and how many marks there are."""
    layout = pool.layout
    return layout.index_entries(entry_tokens) * layout.code_words, layout.index_tokens(entry_tokens)


def _signed(words: torch.Tensor) -> torch.Tensor:
    """int32: words of 32 bits, from 0 on."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
