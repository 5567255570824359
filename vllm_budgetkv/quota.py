"""Quota arithmetic: how many blocks and tokens, from (tokens, quota, page size) alone.

Both the engine core and the workers compute every count here, so neither asks the other. Layers
run one after another and each is compressed inside its own forward, so one layer at a time needs
room for a chunk, and the quota of Q blocks of N tokens holds when

    Q * N  >=  B + ceil(T / L) + R + N

with B the tokens per head, on average, that survive a compression, T the chunk, L the layers,
R the decode growth between two compactions, and N for the partial page of each head:

    sum over (layer, head) of ceil(len / N)  <=  L * H * (B / N + 1) + H * T / N  <=  Q * L * H.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_BUDGET_PAGES = 2


def ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one request may hold, and when it must compress.

    Args:
        blocks: blocks that a request may hold at any instant (Q).
        page_tokens: tokens of a block and of a head-page (N).
        num_layers: attention layers that share the pool (L).
        chunk_tokens: most prompt tokens of a request in one step (T).
        decode_interval_tokens: tokens that decode appends between two compactions (R).
        compresses: False when the policy keeps everything, so that `blocks` is never reached.

    Raises:
        ValueError: the quota leaves no budget; the message names the smallest that does.
    """

    blocks: int
    page_tokens: int
    num_layers: int
    chunk_tokens: int
    decode_interval_tokens: int
    compresses: bool = True

    def __post_init__(self) -> None:
        if self.compresses and self.blocks < self.min_blocks:
            raise ValueError(
                f"a quota of {self.blocks} blocks of {self.page_tokens} tokens is too small for "
                f"chunks of {self.chunk_tokens} tokens over {self.num_layers} layers and "
                f"{self.decode_interval_tokens} decoded tokens between compactions: set "
                f"--kv-page-quota to at least {self.min_blocks} or lower --kv-chunk-tokens"
            )

    @property
    def headroom_tokens(self) -> int:
        """Tokens per head of the quota that no compression may fill: T/L + R + N."""
        chunk_share_tokens = ceil_div(self.chunk_tokens, self.num_layers)
        return chunk_share_tokens + self.decode_interval_tokens + self.page_tokens

    @property
    def min_blocks(self) -> int:
        """The smallest quota whose budget is `MIN_BUDGET_PAGES` pages."""
        budget_tokens = MIN_BUDGET_PAGES * self.page_tokens
        return ceil_div(budget_tokens + self.headroom_tokens, self.page_tokens)

    @property
    def tokens(self) -> int:
        """Tokens per head that fill the quota (Q * N)."""
        return self.blocks * self.page_tokens

    @property
    def budget_tokens(self) -> int:
        """Tokens per head, on average, that survive a compression (B)."""
        return self.tokens - self.headroom_tokens if self.compresses else self.tokens

    @property
    def max_head_tokens(self) -> int:
        """Most tokens that one head may keep; bounds the width of the page tables."""
        return 2 * self.budget_tokens if self.compresses else self.tokens

    @property
    def table_width_pages(self) -> int:
        """Entries of a head's page table: its longest list of pages at any instant."""
        if not self.compresses:
            return self.blocks
        growth_tokens = max(self.chunk_tokens, self.decode_interval_tokens)
        grown_pages = ceil_div(self.max_head_tokens + growth_tokens, self.page_tokens)
        return max(self.blocks, grown_pages)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` tokens in all is ordinary paging, never compressed."""
        return num_tokens <= self.tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks held by a request that has seen `num_tokens` tokens: min(need, Q)."""
        return min(ceil_div(num_tokens, self.page_tokens), self.blocks)

    def compresses_after(self, seen_tokens: int, prompt_tokens: int) -> bool:
        """Whether a chunk that ends at `seen_tokens` of the prompt is compressed."""
        if not self.compresses or self.fits(prompt_tokens):
            return False
        return seen_tokens > self.budget_tokens

    def compacts_before_decode(self, grown_tokens: int, held_tokens: int | None) -> bool:
        """Whether decode must compact before it appends one more token.

        Args:
            grown_tokens: tokens appended since the last compression.
            held_tokens: tokens of every head of a request in the identity state; None once shared.
        """
        if not self.compresses:
            return False
        if held_tokens is not None:
            return held_tokens + 1 > self.tokens
        return grown_tokens + 1 > self.decode_interval_tokens
