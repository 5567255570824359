"""Random heads that hold some of what host memory keeps, for the ops of recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.caches import Cache, build_cache
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.ops import RecallHeads, TierLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.arithmetic.layout import PageLayout

EMPTY, NO_PAGE = -1, -1
# host blocks that no slot holds
SPARE_BLOCKS = 3
# of host memory that is filled at once
FILL_BLOCKS = 64
# channels of unlike means and deviations, as rotated keys have them
MEAN_SPREAD, LEAST_DEVIATION = 2.0, 0.5
# few channels have most of the queries' energy
ENERGY_POWER = 4


@dataclass(frozen=True)
class Remembered:
    """One layer of all slots, whose recall pages are the first of the heads that recall.

    Attributes:
        cache: the heads; of their tokens only the positions mean anything.
        tier: every token of every slot; what no slot holds is NaN.
        recalls: index pages, allocated and not yet written.
        energy: float32 [H, D], of the queries by which an index is encoded.
    """

    cache: Cache
    tier: TierLayer
    recalls: RecallHeads
    energy: torch.Tensor

    def clone(self) -> Remembered:
        """A copy that shares no memory, whose tier is on the device: references reach it there."""
        tokens = self.tier.tokens.to(self.device, copy=True)
        tier = TierLayer(tokens, self.tier.blocks.clone())
        recalls = RecallHeads(*(field.clone() for field in self.recalls))
        return Remembered(self.cache.clone(), tier, recalls, self.energy.clone())

    @property
    def device(self) -> torch.device:
        """Of everything but host memory."""
        return self.cache.table.device

    @property
    def entry_tokens(self) -> int:
        """Tokens of an entry of every index."""
        return int(self.recalls.entry_tokens[0, 0])

    @property
    def index_tokens(self) -> int:
        """Tokens that an index page speaks for."""
        return self.cache.pool.layout.index_tokens(self.entry_tokens)

    def recall_pages(self, slot: int, head: int) -> torch.Tensor:
        """int64 [C / N], the recall pages of a head."""
        count = int(self.recalls.num_recalled[slot, head])
        return self.cache.table[slot, head, : count // self.cache.pool.layout.page_tokens].long()

    def all_recall_pages(self) -> torch.Tensor:
        """int64: the recall pages of all heads."""
        num_slots, num_heads = self.cache.lens.shape
        return torch.cat(
            [self.recall_pages(s, h) for s in range(num_slots) for h in range(num_heads)]
        )

    def held(self, slot: int, head: int) -> torch.Tensor:
        """int64: positions that a head holds behind its recall pages."""
        first, last = int(self.recalls.num_recalled[slot, head]), int(self.cache.lens[slot, head])
        places = _locate(self.cache, slot, head, torch.arange(first, last))
        return self.cache.pool.positions[places].long()


def _locate(
    cache: Cache, slot: int, head: int, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and offsets of some places of a head."""
    page_tokens, places = cache.pool.layout.page_tokens, places.to(cache.table.device)
    return cache.table[slot, head, places // page_tokens].long(), places % page_tokens


def build_tier(
    num_tokens: Sequence[int],
    num_layers: int,
    num_heads: int,
    layout: PageLayout,
    device: torch.device,
) -> list[TierLayer]:
    """Random tokens in shuffled blocks of all layers; pinned memory for a GPU.

    Args:
        num_tokens: of each slot.
        num_layers, num_heads, layout: sizes of a block.
        device: of the block tables.
    """
    counts = [ceil_div(count, layout.page_tokens) for count in num_tokens]
    num_blocks = sum(counts) + SPARE_BLOCKS
    shape = (num_blocks, num_layers, num_heads, 2, layout.page_tokens, layout.head_size)
    tokens = torch.empty(shape, dtype=layout.kv_dtype, pin_memory=device.type == "cuda")
    mean = MEAN_SPREAD * torch.randn(layout.head_size, device=device)
    deviation = LEAST_DEVIATION + torch.rand(layout.head_size, device=device)
    for part in tokens.split(FILL_BLOCKS):
        made = torch.randn(part.shape, device=device) * deviation + mean
        part.copy_(made.to(layout.kv_dtype))
    order = torch.randperm(num_blocks)
    blocks = torch.full((len(counts), max(counts) + 1), NO_PAGE, dtype=torch.int32)
    *held, spare = order.split([*counts, SPARE_BLOCKS])
    tokens[spare] = torch.nan
    for slot, taken in enumerate(held):
        blocks[slot, : len(taken)] = taken
        last = num_tokens[slot] - (len(taken) - 1) * layout.page_tokens
        tokens[taken[-1], ..., last:, :] = torch.nan
    blocks = blocks.to(device)
    return [TierLayer(layer, blocks) for layer in tokens.unbind(1)]


def remember(
    tier: TierLayer,
    num_tokens: Sequence[int],
    held_lens: torch.Tensor,
    recalling: torch.Tensor,
    recalled_pages: int,
    layout: PageLayout,
    entry_tokens: int = 1,
) -> Remembered:
    """Heads that hold random tokens of a layer of a tier, the last ones always.

    Args:
        tier: of the layer.
        num_tokens: of each slot.
        held_lens: int32 [S, H], tokens that each head holds behind its recall pages.
        recalling: bool [S, H], heads that recall.
        recalled_pages: pages for recalled tokens of a head that recalls.
        layout: of the pool.
        entry_tokens: that an entry of the index speaks for.
    """
    device, num_heads = tier.blocks.device, held_lens.shape[1]
    recalled = recalling.int() * (recalled_pages * layout.page_tokens)
    index_pages = [ceil_div(count, layout.index_tokens(entry_tokens)) for count in num_tokens]
    growth_tokens = max(index_pages) * layout.page_tokens
    cache = build_cache(recalled + held_lens, layout, device, growth_tokens=growth_tokens)
    table = torch.full((len(num_tokens), num_heads, max(index_pages) + 1), NO_PAGE)
    table = table.int().to(device)
    for slot, count in enumerate(index_pages):
        for head in recalling[slot].nonzero().flatten().tolist():
            table[slot, head, :count] = cache.free_pages[slot, head * count : (head + 1) * count]
    for slot, count in enumerate(num_tokens):
        for head in range(num_heads):
            lens = int(recalled[slot, head]), int(held_lens[slot, head])
            positions = torch.cat((torch.full(lens[:1], EMPTY), _choose(count, lens[1])))
            places = _locate(cache, slot, head, torch.arange(sum(lens)))
            cache.pool.positions[places] = positions.int().to(device)
    counts = torch.tensor(num_tokens)[:, None] * recalling
    grain = torch.full_like(recalled, entry_tokens)
    per_head = (counts.int(), recalled, grain)
    recalls = RecallHeads(table, *(numbers.to(device) for numbers in per_head))
    energy = torch.rand(num_heads, layout.head_size, device=device) ** ENERGY_POWER
    return Remembered(cache, tier, recalls, energy)


def _choose(num_tokens: int, count: int) -> torch.Tensor:
    """Ascending positions, the last one among them."""
    others = torch.randperm(num_tokens - 1)[: count - 1]
    return torch.cat((others.sort().values, torch.tensor([num_tokens - 1])))
