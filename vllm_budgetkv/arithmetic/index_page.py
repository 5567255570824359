"""How many tokens a page speaks for as an index: codes of entries, and a mark for every token.

An entry is a code of `code_words` words for g neighbouring tokens, of which each has a bit:

    E (32 code_words + g) <= 32 page_words,    E a multiple of 8
"""

from __future__ import annotations

# tokens that an entry may speak for (g), from fine to coarse
ENTRY_TOKENS = (1, 2, 4, 8)
WORD_BITS = 32


def entries_of_page(page_words: int, code_words: int, entry_tokens: int) -> int:
    """Entries of an index page (E).

    Args:
        page_words: words of 32 bits that keys and values of a page take.
        code_words: words of an entry's code.
        entry_tokens: tokens of an entry (g).
    """
    entry_bits = WORD_BITS * code_words + entry_tokens
    return WORD_BITS * page_words // entry_bits // 8 * 8
