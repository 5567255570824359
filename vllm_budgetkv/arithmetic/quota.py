"""Quota arithmetic: how many blocks and tokens, from (tokens, quota, page size) alone.

Both the engine core and the workers compute every count here, so neither asks the other. Layers
run one after another and each is compressed inside its own forward, so one layer at a time needs
room for a chunk, and the quota of Q blocks of m pages of N tokens holds when

    Q * m * N  >=  B + ceil(T / L) + R + N

with B the tokens per head, on average, that survive a compression, T the chunk, L the layers,
R the decode growth between two compactions, and N for the partial page of each head; tokens that
a request pins are taken from B:

    sum over (layer, head) of ceil(len / N)  <=  L * H * (B / N + 1) + H * T / N  <=  Q * m * L * H.

A block is a page of every head (m = 1), but for models whose blocks also hold recurrent state:
there it is as many as the state of a layer is long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.recall import Recall

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from vllm_budgetkv.arithmetic.recall import RecallRoom

MIN_BUDGET_PAGES = 2


def ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def least_batch_tokens(chunk_tokens: int, max_num_seqs: int) -> int:
    """Tokens of a step with room for a chunk of one request and a token of every other."""
    return chunk_tokens + max_num_seqs - 1


def good_batch_tokens(wanted_tokens: int, chunk_tokens: int, max_num_seqs: int) -> int:
    """Tokens of a step with room for as many chunks as `wanted_tokens` hold, and for the decodes.

    With less, a chunk would wait for one token of each request that decodes.
    """
    num_chunks = max(1, wanted_tokens // chunk_tokens)
    return max(wanted_tokens, least_batch_tokens(num_chunks * chunk_tokens, max_num_seqs))


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one request may hold, and when it must compress.

    Args:
        blocks: blocks that a request may hold at any instant (Q).
        page_tokens: tokens of a head-page (N).
        num_layers: attention layers that share the pool of a worker (L): with stages, those of one.
        chunk_tokens: most prompt tokens of a request in one step (T).
        decode_interval_tokens: tokens that decode appends between two compactions (R).
        compresses: False when the policy keeps everything, so that `blocks` is never reached.
        retrieves: whether decode reads some pages only, so that output which is computed again
            must be read by decode too, a token at a time.
        recall: what of the quota brings tokens back from host memory; None if nothing does.
        pinned_tokens: of the prompt, that stay in every head beside the budget.
        block_pages: head-pages of a head in a block (m).

    Raises:
        ValueError: the quota leaves no budget; the message names the smallest that does.
    """

    blocks: int
    page_tokens: int
    num_layers: int
    chunk_tokens: int
    decode_interval_tokens: int
    compresses: bool = True
    retrieves: bool = False
    recall: Recall | None = None
    pinned_tokens: int = 0
    block_pages: int = 1

    def __post_init__(self) -> None:
        if self.compresses and self.blocks < self.min_blocks:
            raise ValueError(
                f"a quota of {self.blocks} blocks of {self.block_tokens} tokens is too small for "
                f"chunks of {self.chunk_tokens} tokens over {self.num_layers} layers and "
                f"{self.decode_interval_tokens} decoded tokens between compactions: it must be at "
                f"least {self.min_blocks} blocks ({self.min_blocks * self.block_tokens} tokens); "
                f"raise it or lower {self._largest_part}"
            )

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` made of a quota that travels between processes."""
        recall = fields["recall"]
        return cls(**{**fields, "recall": None if recall is None else Recall(**recall)})

    @property
    def headroom_tokens(self) -> int:
        """Tokens per head of the quota that no choice may fill: T/L + R + N, and pinned ones."""
        chunk_share_tokens = ceil_div(self.chunk_tokens, self.num_layers)
        growth_tokens = self.decode_interval_tokens
        if self.streams:
            growth_tokens = max(growth_tokens, ceil_div(self.page_tokens, self.num_layers))
        return chunk_share_tokens + growth_tokens + self.page_tokens + self.pinned_tokens

    @property
    def streams(self) -> bool:
        """Whether some chunks of a prompt attend to what was dropped of it, too."""
        return self.recall is not None and self.recall.rereads

    @property
    def piece_pages(self) -> int:
        """Pages of each head of a layer through which a prompt streams back, a piece at a time.

        They are those in which output will grow: R tokens of every layer, for one layer at a time.
        """
        growth_tokens = max(self.num_layers * self.decode_interval_tokens, self.page_tokens)
        return growth_tokens // self.page_tokens

    @property
    def _largest_part(self) -> str:
        """The option that takes most of the headroom."""
        chunk_share_tokens = ceil_div(self.chunk_tokens, self.num_layers)
        if chunk_share_tokens >= self.decode_interval_tokens:
            return "--kv-chunk-tokens"
        return "--kv-decode-interval-tokens"

    @property
    def min_blocks(self) -> int:
        """The smallest quota whose budget is `MIN_BUDGET_PAGES` pages."""
        budget_tokens = MIN_BUDGET_PAGES * self.page_tokens
        return ceil_div(budget_tokens + self.headroom_tokens, self.block_tokens)

    @property
    def block_tokens(self) -> int:
        """Tokens per head of a block (m * N)."""
        return self.block_pages * self.page_tokens

    @property
    def tokens(self) -> int:
        """Tokens per head that fill the quota (Q * m * N)."""
        return self.blocks * self.block_tokens

    @property
    def budget_tokens(self) -> int:
        """Tokens per head, on average, that survive a compression beside pinned ones (B)."""
        return self.tokens - self.headroom_tokens if self.compresses else self.tokens

    @property
    def max_chosen_tokens(self) -> int:
        """Most tokens that one head may keep beside pinned ones."""
        return 2 * self.budget_tokens if self.compresses else self.tokens

    @property
    def max_head_tokens(self) -> int:
        """Most tokens that one head may keep; bounds the width of the page tables."""
        return self.max_chosen_tokens + (self.pinned_tokens if self.compresses else 0)

    @property
    def table_width_pages(self) -> int:
        """Entries of a head's page table: its longest list of pages at any instant."""
        if not self.compresses:
            return self.blocks * self.block_pages
        growth_tokens = max(self.chunk_tokens, self.decode_interval_tokens)
        recalled_tokens = 0 if self.recall is None else self.budget_tokens
        most_tokens = self.max_head_tokens + recalled_tokens + growth_tokens
        grown_pages = ceil_div(most_tokens, self.page_tokens)
        return max(self.blocks * self.block_pages, grown_pages)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` tokens in all is ordinary paging, never compressed."""
        return num_tokens <= self.tokens

    def blocks_for(self, num_tokens: int, prompt_tokens: int) -> int:
        """Blocks held by a request that has seen `num_tokens` tokens: min(need, Q).

        One whose prompt will not fit holds all of them from its first token.
        """
        if not self.fits(prompt_tokens):
            return self.blocks
        return min(ceil_div(num_tokens, self.block_tokens), self.blocks)

    def compresses_prompt(self, prompt_tokens: int) -> bool:
        """Whether the chunks of a prompt are compressed, so that its answer hangs on their ends."""
        return self.compresses and not self.fits(prompt_tokens)

    def recall_room(self, prompt_tokens: int) -> RecallRoom | None:
        """What recall takes of a request with such a prompt; None if it gets none."""
        if self.recall is None or not self.compresses_prompt(prompt_tokens):
            return None
        return self.recall.room(prompt_tokens, self.budget_tokens, self.page_tokens)

    def most_recall_pages(self, longest_tokens: int) -> tuple[int, int]:
        """Most index pages and recall pages of a head, of prompts of at most so many tokens."""
        assert self.recall is not None
        sizes = (self.budget_tokens, self.page_tokens)
        index_pages = self.recall.most_index_pages(longest_tokens, *sizes)
        return index_pages, self.recall.most_slot_pages(*sizes)

    def postpones(self, prompt_tokens: int, found_tokens: int, end_of_vision: int) -> bool:
        """Whether the heads hold nothing of a prompt in host memory until its first token.

        All that it computes attends to host memory then.

        Args:
            prompt_tokens: of the prompt.
            found_tokens: of it, that another prompt had left when it was admitted first.
            end_of_vision: tokens up to the end of its last picture; 0 if there is none.
        """
        if self.recall is None or self.recall.rereads_all:
            return self.recall is not None
        question_start = self.recall.question_start(prompt_tokens, end_of_vision)
        return found_tokens > 0 and question_start < self.next_stop(found_tokens, prompt_tokens)

    def chunks_end(self, prompt_tokens: int) -> int:
        """Tokens of the prompt that come in chunks: its last comes by itself where heads recall.

        Behind it stands the first token of the answer, which must see what comes back. Where the
        last chunk attends to all of the prompt, it sees that already.
        """
        is_alone = not self.streams and self.recall_room(prompt_tokens) is not None
        return prompt_tokens - is_alone

    def compresses_after(self, seen_tokens: int, prompt_tokens: int) -> bool:
        """Whether a chunk that ends at `seen_tokens` of the prompt is compressed."""
        if not self.compresses_prompt(prompt_tokens) or seen_tokens <= self.budget_tokens:
            return False
        return seen_tokens <= self.chunks_end(prompt_tokens)

    def compacts_before(self, start_tokens: int, prompt_tokens: int) -> bool:
        """Whether all layers are compacted before the token behind `start_tokens` is appended.

        Output alone leads to it, and whether it is decoded or computed again does not matter: a
        prompt that fits is compacted when the quota is full, and every request each time that it
        has grown by the interval since its last compression.
        """
        if not self.compresses or start_tokens < prompt_tokens:
            return False
        grown_tokens = start_tokens - self._first_compression(prompt_tokens)
        # behind a prompt that does not fit, its last chunk has just been compressed
        least_tokens = 0 if self.fits(prompt_tokens) else self.decode_interval_tokens
        return grown_tokens >= least_tokens and grown_tokens % self.decode_interval_tokens == 0

    def compactions(self, seen_tokens: int, prompt_tokens: int) -> int:
        """How often output has led to a compression of a request that has seen so many tokens."""
        if not self.compresses or seen_tokens <= prompt_tokens:
            return 0
        grown_tokens = seen_tokens - 1 - self._first_compression(prompt_tokens)
        if grown_tokens < 0:
            return 0
        # a prompt that fits is compressed for the first time where others have been already
        return grown_tokens // self.decode_interval_tokens + self.fits(prompt_tokens)

    def next_stop(self, start_tokens: int, prompt_tokens: int) -> int:
        """Where a chunk that begins behind `start_tokens` must end at the latest.

        A function of its arguments alone, so that the same request is compressed at the same
        points whatever runs beside it and however often it is computed again. A chunk of a prompt
        that is compressed must end there and nowhere before: at a multiple of T, or at its end.
        The first is a page, for which there is room beside other chunks, so that a request which
        waits for the room of a whole one has been admitted and holds back nobody.

        Args:
            start_tokens: tokens of the request that have been seen.
            prompt_tokens: of the client's prompt, without any output.
        """
        longest = start_tokens + self.chunk_tokens
        if start_tokens < prompt_tokens:
            if self.compresses_prompt(prompt_tokens):
                longest -= start_tokens % self.chunk_tokens
                if start_tokens == 0:
                    longest = min(longest, self.page_tokens)
                if start_tokens < self.chunks_end(prompt_tokens):
                    return min(longest, self.chunks_end(prompt_tokens))
            return min(longest, prompt_tokens)
        first = self._first_compression(prompt_tokens)
        if start_tokens < first:
            return min(longest, first)
        if self.retrieves:
            return start_tokens + 1
        grown_tokens = (start_tokens - first) % self.decode_interval_tokens
        return min(longest, start_tokens - grown_tokens + self.decode_interval_tokens)

    def _first_compression(self, prompt_tokens: int) -> int:
        """Tokens seen at the first compression that output may lead to, or that it begins with."""
        return self.tokens if self.fits(prompt_tokens) else self.chunks_end(prompt_tokens)
