"""Prefill and output of one request whose every head-page is counted after every append."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from vllm_budgetkv.arithmetic.quota import Quota, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    """The smallest quota of random sizes, or a few blocks more."""
    numbers = {
        "page_tokens": draw(st.sampled_from([8, 16, 32])),
        "num_layers": draw(st.integers(1, 6)),
        "chunk_tokens": draw(st.integers(1, 200)),
        "decode_interval_tokens": draw(st.integers(1, 80)),
        "block_pages": draw(st.sampled_from([1, 1, 3, 22])),
    }
    smallest = Quota(blocks=10**6, **numbers).min_blocks
    return Quota(blocks=smallest + draw(st.integers(0, 20)), **numbers)


class PageSimulation:
    """Lengths of all heads of a request.

    Args:
        quota: what must hold.
        num_heads: of each layer.
        prompt_tokens: of its prompt.
        chance: draws the tokens of each chunk.
        keeps_stops: whether the chunks of a prompt that is compressed end where they must, and not
            anywhere before.
        compressed: tokens that had been seen at each compression, in order.
    """

    def __init__(
        self,
        quota: Quota,
        num_heads: int,
        prompt_tokens: int,
        chance: random.Random,
        *,
        keeps_stops: bool,
    ) -> None:
        self.quota, self.prompt_tokens, self.chance = quota, prompt_tokens, chance
        self.keeps_stops = keeps_stops and quota.compresses_prompt(prompt_tokens)
        self.lens = [[0] * num_heads for _ in range(quota.num_layers)]
        self.compressed: list[int] = []

    @classmethod
    def drawn(cls, quota: Quota, num_heads: int, data: st.DataObject) -> PageSimulation:
        """Of a prompt that does not fit, in chunks of any size."""
        prompt_tokens = quota.tokens + data.draw(st.integers(1, 300))
        chance = random.Random(data.draw(st.integers(0, 999)))
        return cls(quota, num_heads, prompt_tokens, chance, keeps_stops=False)

    def run(self, compress: Callable[[int], None], output_tokens: int) -> None:
        """A whole request; `compress` shrinks the lengths of a layer.

        Raises:
            AssertionError: the pages exceed the quota, or a head its row of the table.
        """
        quota, prompt_tokens, seen_tokens = self.quota, self.prompt_tokens, 0
        while seen_tokens < prompt_tokens + output_tokens:
            if quota.compacts_before(seen_tokens, prompt_tokens):
                self._note(seen_tokens)
                for layer in range(quota.num_layers):
                    compress(layer)
            room = quota.next_stop(seen_tokens, prompt_tokens) - seen_tokens
            assert 1 <= room <= quota.chunk_tokens
            in_prompt = seen_tokens < prompt_tokens
            if not (in_prompt and self.keeps_stops) and self.chance.random() < 0.5:
                room = self.chance.randint(1, room)
            new_tokens = min(room, prompt_tokens + output_tokens - seen_tokens)
            seen_tokens += new_tokens
            compresses = in_prompt and quota.compresses_after(seen_tokens, prompt_tokens)
            if compresses:
                self._note(seen_tokens)
            for layer in range(quota.num_layers):
                self._append(layer, new_tokens)
                if compresses:
                    compress(layer)

    def _note(self, seen_tokens: int) -> None:
        assert seen_tokens not in self.compressed, "nothing was appended in between"
        self.compressed.append(seen_tokens)

    def _append(self, layer: int, new_tokens: int) -> None:
        quota = self.quota
        self.lens[layer] = [held + new_tokens for held in self.lens[layer]]
        pages = [ceil_div(held, quota.page_tokens) for row in self.lens for held in row]
        most_pages = quota.blocks * quota.block_pages * quota.num_layers * len(self.lens[0])
        assert sum(pages) <= most_pages
        assert max(pages) <= quota.table_width_pages
