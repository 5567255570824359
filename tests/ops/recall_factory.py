"""Random heads whose prompts host memory keeps, for the tests of recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tests.ops.factories import BAD_PAGE, Cache, make_cache
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.ops import RecallHeads, TierLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.arithmetic.layout import PageLayout

NUM_LAYERS = 2  # the tier's layer is one of two, so its blocks lie apart


@dataclass
class Remembered:
    """One layer of a cache whose heads hold some of the tokens that a tier keeps.

    Args:
        cache: the heads; recall pages stand in front of what they hold.
        tier: every token of every slot; free blocks are NaN.
        recalls: index pages, allocated and not yet written.
        num_tokens: of each slot.
        held: positions that each head holds behind its recall pages, [S][H].
    """

    cache: Cache
    tier: TierLayer
    recalls: RecallHeads
    num_tokens: Sequence[int]
    held: list[list[torch.Tensor]]

    def clone(self) -> Remembered:
        """A copy that shares no memory."""
        tier = TierLayer(self.tier.tokens.clone(), self.tier.blocks.clone())
        recalls = RecallHeads(*(field.clone() for field in self.recalls))
        return Remembered(self.cache.clone(), tier, recalls, self.num_tokens, self.held)

    @property
    def entry_tokens(self) -> int:
        """Tokens of an entry of every index."""
        return int(self.recalls.entry_tokens[0, 0])

    @property
    def index_tokens(self) -> int:
        """Tokens that an index page speaks for."""
        return self.cache.pool.layout.index_tokens(self.entry_tokens)

    def token(self, slot: int, head: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of a token as the tier has them."""
        block = int(self.tier.blocks[slot, position // self.tier.page_tokens])
        key, value = self.tier.tokens[block, head, :, position % self.tier.page_tokens]
        return key, value

    def keys(self, slot: int, head: int) -> torch.Tensor:
        """[n, D]: the tier's keys of one head."""
        return torch.stack([self.token(slot, head, p)[0] for p in range(self.num_tokens[slot])])


def make_remembered(
    num_tokens: Sequence[int],
    layout: PageLayout,
    *,
    num_heads: int = 2,
    held_share: float = 0.3,
    recall_pages: int = 2,
    recalling: Sequence[Sequence[bool]] | None = None,
    entry_tokens: int = 1,
    seed: int = 0,
) -> Remembered:
    """Slots whose heads hold a random share of `num_tokens` tokens, the last ones always.

    Args:
        num_tokens: of each slot (n).
        layout: of the pool.
        num_heads: KV heads (H).
        held_share: share of the tokens that a head holds.
        recall_pages: pages for recalled tokens of a head that recalls.
        recalling: which heads recall, [S][H]; all but the last head of each slot unless said.
        entry_tokens: that an entry of the index speaks for.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    page_tokens = layout.page_tokens
    if recalling is None:
        recalling = [[head < num_heads - 1 for head in range(num_heads)] for _ in num_tokens]
    held = [
        [_positions(count, held_share, generator) for _ in range(num_heads)] for count in num_tokens
    ]
    recalled = [[recall_pages * page_tokens * flag for flag in flags] for flags in recalling]
    lens = [
        [extra + len(positions) for extra, positions in zip(*pair, strict=True)]
        for pair in zip(recalled, held, strict=True)
    ]
    index_pages = [ceil_div(count, layout.index_tokens(entry_tokens)) for count in num_tokens]
    needed = max(index_pages) * num_heads * len(num_tokens)
    cache = make_cache(lens, layout, free_pages=needed, seed=seed)
    tier = _make_tier(num_tokens, layout, num_heads, generator)
    index = torch.full((len(num_tokens), num_heads, max(index_pages) + 1), BAD_PAGE).int()
    for slot, count in enumerate(index_pages):
        for head in range(num_heads):
            if recalling[slot][head]:
                first = head * count
                index[slot, head, :count] = cache.free_pages[slot, first : first + count]
    counts = torch.tensor(num_tokens)[:, None] * torch.tensor(recalling)
    grain = torch.full_like(counts, entry_tokens).int()
    recalls = RecallHeads(index, counts.int(), torch.tensor(recalled).int(), grain)
    made = Remembered(cache, tier, recalls, num_tokens, held)
    _fill(made)
    return made


def _positions(count: int, share: float, generator: torch.Generator) -> torch.Tensor:
    is_held = torch.rand(count, generator=generator) < share
    is_held[-1] = True
    return is_held.nonzero().flatten()


def _make_tier(
    num_tokens: Sequence[int], layout: PageLayout, num_heads: int, generator: torch.Generator
) -> TierLayer:
    page_tokens = layout.page_tokens
    counts = [ceil_div(count, page_tokens) for count in num_tokens]
    num_blocks = sum(counts) + 3
    shape = (num_blocks, NUM_LAYERS, num_heads, 2, page_tokens, layout.head_size)
    tokens = torch.full(shape, torch.nan, dtype=layout.kv_dtype)
    blocks = torch.full((len(num_tokens), max(counts) + 1), -1, dtype=torch.int32)
    order = iter(torch.randperm(num_blocks, generator=generator).tolist())
    # channels of unlike means and deviations, as rotated keys have them
    mean = 2 * torch.randn(layout.head_size, generator=generator)
    deviation = torch.rand(layout.head_size, generator=generator) + 0.5
    for slot, count in enumerate(counts):
        taken = [next(order) for _ in range(count)]
        blocks[slot, :count] = torch.tensor(taken)
        for number, block in enumerate(taken):
            filled = min(page_tokens, num_tokens[slot] - number * page_tokens)
            made = torch.randn(num_heads, 2, filled, layout.head_size, generator=generator)
            tokens[block, -1, :, :, :filled] = (mean + deviation * made).to(layout.kv_dtype)
    return TierLayer(tokens[:, -1], blocks)


def _fill(made: Remembered) -> None:
    """Write what the heads hold; recall pages are empty, and NaN but for their positions."""
    pool, page_tokens = made.cache.pool, made.cache.pool.layout.page_tokens
    for slot, heads in enumerate(made.held):
        for head, positions in enumerate(heads):
            skipped = int(made.recalls.num_recalled[slot, head])
            table = made.cache.table[slot, head]
            pages = table[: skipped // page_tokens].long()
            pool.keys[pages], pool.values[pages] = torch.nan, torch.nan
            pool.positions[pages] = -1
            for place, position in enumerate(positions.tolist(), start=skipped):
                page, offset = int(table[place // page_tokens]), place % page_tokens
                key, value = made.token(slot, head, position)
                pool.keys[page, offset], pool.values[page, offset] = key, value
                pool.positions[page, offset] = position
