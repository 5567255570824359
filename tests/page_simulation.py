"""Prefill and decode of one request whose every head-page is counted after every append."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from vllm_budgetkv.quota import Quota, ceil_div

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
    }
    smallest = Quota(blocks=10**6, **numbers).min_blocks
    return Quota(blocks=smallest + draw(st.integers(0, 20)), **numbers)


class PageSimulation:
    """Lengths of all heads of a request that does not fit its quota.

    Args:
        quota: what must hold.
        num_heads: of each layer.
        data: draws prompt and chunks.
    """

    def __init__(self, quota: Quota, num_heads: int, data: st.DataObject) -> None:
        self.quota, self.data = quota, data
        self.lens = [[0] * num_heads for _ in range(quota.num_layers)]

    def run(self, compress: Callable[[int], None]) -> None:
        """A whole request; `compress` shrinks the lengths of a layer.

        Raises:
            AssertionError: the pages exceed the quota, or a head its row of the table.
        """
        self._prefill(compress)
        grown_tokens = 0
        for _ in range(2 * self.quota.decode_interval_tokens + 3):
            if self.quota.compacts_before_decode(grown_tokens, None):
                for layer in range(self.quota.num_layers):
                    compress(layer)
                grown_tokens = 0
            for layer in range(self.quota.num_layers):
                self._append(layer, 1)
            grown_tokens += 1

    def _prefill(self, compress: Callable[[int], None]) -> None:
        prompt_tokens = self.quota.tokens + self.data.draw(st.integers(1, 300))
        seen_tokens = 0
        while seen_tokens < prompt_tokens:
            chunk_tokens = self.data.draw(st.integers(1, self.quota.chunk_tokens))
            new_tokens = min(chunk_tokens, prompt_tokens - seen_tokens)
            seen_tokens += new_tokens
            for layer in range(self.quota.num_layers):
                self._append(layer, new_tokens)
                if self.quota.compresses_after(seen_tokens, prompt_tokens):
                    compress(layer)

    def _append(self, layer: int, new_tokens: int) -> None:
        quota = self.quota
        self.lens[layer] = [held + new_tokens for held in self.lens[layer]]
        pages = [ceil_div(held, quota.page_tokens) for row in self.lens for held in row]
        assert sum(pages) <= quota.blocks * quota.num_layers * len(self.lens[0])
        assert max(pages) <= quota.table_width_pages
