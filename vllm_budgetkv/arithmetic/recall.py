"""What recall takes of a quota: pages of an index, and pages for what comes back.

Behind the prompt, K of the L * H heads of a request get an index of its n prompt tokens and C pages
for recalled tokens. An entry of the index speaks for g tokens, the fewest with which it takes no
more than its share, and a page holds E of them. What is left of the budget is shared as ever:

    L * H * (B - resident) >= K * (ceil(n / (g E)) + C) * N
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_budgetkv.arithmetic.index_page import ENTRY_TOKENS, entries_of_page


@dataclass(frozen=True, kw_only=True)
class RecallRoom:
    """Pages that recall takes of one request, of each head that recalls.

    Args:
        entry_tokens: that an entry of the index speaks for (g).
        index_pages: of the index.
        slot_pages: for recalled tokens (C / N).
        resident_tokens: tokens per head, on average, that stay beside them.
    """

    entry_tokens: int
    index_pages: int
    slot_pages: int
    resident_tokens: int


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Which share of the heads recalls, and how much.

    Args:
        num_heads: heads that recall, of all layers (K).
        all_heads: KV heads of all layers (L * H).
        page_words: words of 32 bits that keys and values of a page take.
        code_words: words of an entry's code.
        slots_share: recalled tokens as a share of what is left of the budget beside the index.
        max_index_share: most of the budget that the index may take; a prompt whose coarsest index
            takes more does without.
        rereads_all: whether all chunks of a prompt attend to all of it that was seen, so that what
            stays is chosen behind it.
        question_tokens: last tokens of a prompt without pictures, which ask about the rest, and so
            attend to all of it, as those behind the last picture of others; 0 if none do.
    """

    num_heads: int
    all_heads: int
    page_words: int
    code_words: int
    slots_share: float
    max_index_share: float
    rereads_all: bool = False
    question_tokens: int = 0

    @property
    def rereads(self) -> bool:
        """Whether some chunks of a prompt attend to all of it that was seen, dropped or not."""
        return self.rereads_all or self.question_tokens > 0

    def question_start(self, prompt_tokens: int, end_of_vision: int) -> int:
        """Tokens in front of those that ask about them, and so attend to all; all if none does.

        Args:
            prompt_tokens: of the prompt.
            end_of_vision: tokens up to the end of its last picture; 0 if there is none.
        """
        if not self.question_tokens:
            return prompt_tokens
        return end_of_vision or max(0, prompt_tokens - self.question_tokens)

    def index_tokens(self, entry_tokens: int) -> int:
        """Tokens that a page speaks for as an index, with so many to an entry."""
        return entry_tokens * entries_of_page(self.page_words, self.code_words, entry_tokens)

    def room(self, prompt_tokens: int, budget_tokens: int, page_tokens: int) -> RecallRoom | None:
        """What a prompt leaves; None if its index would take too much.

        Args:
            prompt_tokens: n.
            budget_tokens: tokens per head, on average, that survive a compression (B).
            page_tokens: N.
        """
        for entry_tokens in ENTRY_TOKENS:
            index_pages = -(-prompt_tokens // self.index_tokens(entry_tokens))
            index_tokens = self._average(index_pages * page_tokens)
            slot_pages = self._slot_pages(budget_tokens - index_tokens, page_tokens)
            if index_tokens <= self.max_index_share * budget_tokens and slot_pages > 0:
                taken_tokens = self._average((index_pages + slot_pages) * page_tokens)
                return RecallRoom(
                    entry_tokens=entry_tokens,
                    index_pages=index_pages,
                    slot_pages=slot_pages,
                    resident_tokens=budget_tokens - taken_tokens,
                )
        return None

    def _slot_pages(self, rest_tokens: int, page_tokens: int) -> int:
        """Pages for recalled tokens, of what is left of the budget beside the index."""
        return max(0, int(self.slots_share * rest_tokens) // page_tokens)

    def most_slot_pages(self, budget_tokens: int, page_tokens: int) -> int:
        """Most pages for recalled tokens of a head: those beside an index of a page; see `room`.

        A longer prompt may have more of them than a shorter one, whose index is finer.
        """
        return self._slot_pages(budget_tokens - self._average(page_tokens), page_tokens)

    def most_index_pages(self, longest_tokens: int, budget_tokens: int, page_tokens: int) -> int:
        """Most index pages of a head, of prompts of at most so many tokens; see `room`."""
        allowed_tokens = self.max_index_share * budget_tokens * self.all_heads / self.num_heads
        return min(-(-longest_tokens // self.index_tokens(1)), int(allowed_tokens) // page_tokens)

    def _average(self, tokens: int) -> int:
        """Tokens of each head that recalls, spread over all heads and rounded up."""
        return -(-tokens * self.num_heads // self.all_heads)
