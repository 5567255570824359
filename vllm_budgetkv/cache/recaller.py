"""What comes back: an index of the prompt, and pages for recalled tokens, of some heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.side_stream import SideStream
from vllm_budgetkv.cache.tables import NO_PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from vllm_budgetkv.arithmetic.recall import Recall
    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.rows import Rows
    from vllm_budgetkv.cache.tables import HeadTables
    from vllm_budgetkv.cache.tier import HostTier

EMPTY = -1


@dataclass(frozen=True)
class Recaller:
    """Index and recall pages of all slots. Its pages come from each request's own free stack.

    Args:
        tables: which pages each head holds; recall pages are the first of a head that recalls.
        tier: what host memory keeps.
        plan: how much recalls.
        scales: of the logits, by the index of the layer.
        index: int32 [S, L, H, I], index pages.
        slots: int32 [S, L, H, C / N], pages for recalled tokens.
        num_tokens: int32 [S, L, H], tokens that the index speaks for; 0 where nothing recalls.
        num_recalled: int32 [S, L, H], recalled tokens, whole pages.
        entry_tokens: int32 [S, L, H], tokens that an entry of the index speaks for.
        moved: int32 [S, L, H], tokens fetched so far.
        writes: where writes to host memory run.
    """

    tables: HeadTables
    tier: HostTier
    plan: Recall
    scales: Mapping[int, float]
    index: torch.Tensor
    slots: torch.Tensor
    num_tokens: torch.Tensor
    num_recalled: torch.Tensor
    entry_tokens: torch.Tensor
    moved: torch.Tensor
    writes: SideStream

    @classmethod
    def empty(
        cls,
        tables: HeadTables,
        tier: HostTier,
        plan: Recall,
        scales: Mapping[int, float],
        *,
        index_pages: int,
        slot_pages: int,
    ) -> Self:
        """A recaller of which no slot recalls anything.

        Args:
            tables, tier, plan, scales: see the class.
            index_pages, slot_pages: most of a head.
        """

        def ids(width: int) -> torch.Tensor:
            shape = (*tables.lens.shape, width)
            return tables.lens.new_full(shape, NO_PAGE)

        return cls(
            tables=tables,
            tier=tier,
            plan=plan,
            scales=scales,
            index=ids(index_pages),
            slots=ids(slot_pages),
            num_tokens=torch.zeros_like(tables.lens),
            num_recalled=torch.zeros_like(tables.lens),
            entry_tokens=torch.ones_like(tables.lens),
            moved=torch.zeros_like(tables.lens),
            writes=SideStream(tables.lens.device),
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of one head that come back: its key and its value."""
        layout = self.tables.pool.layout
        return 2 * layout.head_size * layout.kv_dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of all tables of one slot."""
        counts = (self.num_tokens, self.num_recalled, self.entry_tokens, self.moved)
        tensors = (self.index, self.slots, *counts, self.tier.blocks)
        return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def _layers(self) -> list[ops.RecallHeads]:
        """Made once: a decode step asks for them in every layer."""
        counts = (self.num_tokens, self.num_recalled, self.entry_tokens)
        fields = (tensor.unbind(1) for tensor in (self.index, *counts))
        return [ops.RecallHeads(*found) for found in zip(*fields, strict=True)]

    @cached_property
    def _moved(self) -> list[torch.Tensor]:
        return list(self.moved.unbind(1))

    def heads(self, layer: int) -> ops.RecallHeads:
        """One layer of all slots."""
        return self._layers[layer]

    def store(self, layer: int, rows: Rows, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens of a layer, [T, H, D], to host memory, beside what follows."""
        with self.writes.beside(key, value):
            ops.store(key, value, rows, self.tier.layer(layer))

    def join(self) -> None:
        """Wait for all writes, before rows and host blocks change and before they are read."""
        self.writes.join()

    def recall(self, layer: int, rows: Rows, query: torch.Tensor) -> None:
        """Bring back what the queries of a layer, [R, Hq, D], look for, a row each."""
        ops.recall(
            query,
            self.tables.layer(layer),
            rows,
            self.heads(layer),
            self.tier.layer(layer),
            self.scales[layer],
            self._moved[layer],
        )

    @record_function("budgetkv::open_recall")
    def open(self, request: RequestState, probes: Sequence[torch.Tensor | None]) -> None:
        """Choose the heads that recall, build their index and give them pages to fill.

        Call it once all layers have been compressed for the last time in the prompt. The heads are
        those whose attention from the question is the most concentrated.

        Args:
            request: in the tier.
            probes: of each layer, [M, Hq, D], say which channels of a key matter; None if unknown.
        """
        slot, num_tokens = request.slot, request.computed_tokens
        room = request.quota.recall_room(request.prompt_tokens)
        assert room is not None
        chosen = self.tables.concentration[slot].flatten().topk(self.plan.num_heads).indices
        index_tokens = self.plan.index_tokens(room.entry_tokens)
        self._take(self.index, slot, chosen, ceil_div(num_tokens, index_tokens))
        self.entry_tokens[slot] = room.entry_tokens
        empty = self._take(self.slots, slot, chosen, room.slot_pages)
        self.tables.pool.positions[empty.long()] = EMPTY
        self.num_tokens[slot].flatten()[chosen] = num_tokens
        for layer, probe in enumerate(probes):
            energy = self._energy(probe)
            ops.encode(slot, self.tier.layer(layer), self.heads(layer), self.tables.pool, energy)
        page_tokens = self.tables.pool.layout.page_tokens
        # a page is recalled as a whole or not at all, since tokens follow it
        lacking_pages = (num_tokens - self.tables.lens[slot]) // page_tokens
        recalled_pages = lacking_pages.clamp(max=room.slot_pages) * (self.num_tokens[slot] > 0)
        self.num_recalled[slot] = recalled_pages * page_tokens
        self.attach(request)

    def _energy(self, probe: torch.Tensor | None) -> torch.Tensor:
        """float32 [H, D]: mean square of each channel over the queries of a KV head."""
        num_heads, head_size = self.tables.num_heads, self.tables.pool.layout.head_size
        if probe is None:
            return torch.ones(num_heads, head_size, device=self.tables.lens.device)
        squares = probe.float().square().mean(dim=0)
        return squares.unflatten(0, (num_heads, -1)).mean(dim=1)

    def _take(
        self, pages: torch.Tensor, slot: int, chosen: torch.Tensor, num_pages: int
    ) -> torch.Tensor:
        """Pages from the slot's free stack for each of the chosen heads, entered in `pages`."""
        taken = self.tables.take(slot, len(chosen) * num_pages).view(-1, num_pages)
        pages[slot].flatten(0, 1)[chosen, :num_pages] = taken
        return taken

    def attach(self, request: RequestState) -> None:
        """Put the recall pages in front of what their heads hold, and mark what is held.

        A head that recalls reads all of its pages: digests know nothing of what was fetched.
        """
        slot = request.slot
        self.tables.push_front(slot, self.slots[slot], self.num_recalled[slot])
        self.tables.is_retrieving[slot] &= self.num_tokens[slot] == 0
        for layer in range(self.tables.num_layers):
            ops.mark(slot, self.tables.layer(layer), self.heads(layer))

    def detach(self, request: RequestState) -> None:
        """Take the recall pages away from the tables; they keep what they hold."""
        self.tables.pop_front(request.slot, self.num_recalled[request.slot])

    def release(self, slot: int) -> None:
        """Forget everything of a slot."""
        self.tier.release(slot)
        self.index[slot] = NO_PAGE
        self.slots[slot] = NO_PAGE
        for counts in (self.num_tokens, self.num_recalled, self.moved):
            counts[slot] = 0
