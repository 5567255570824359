"""The probe bank: queries of the last text tokens of one request, for every layer.

Vision tokens never enter. A look-ahead gives the bank its first content (the seed); then only text
behind the last vision token replaces it, because the seed already holds all text before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.cache.probe.rotation import Temperature, rotate
from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the queries of one layer change with their position.

    Args:
        inv_freq: float32 [rotary/2], radians per position of each pair; none in a layer without.
        is_neox: pairing style, see `rotate`.
        start: first element of the head that is rotated.
        gain: float32 [D], weight of a norm behind the rotation.
        temperature: factor behind the rotation that grows with the position.
    """

    inv_freq: torch.Tensor
    is_neox: bool
    start: int = 0
    gain: torch.Tensor | None = None
    temperature: Temperature | None = None

    def turn(
        self, query: torch.Tensor, position: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Queries of `position`, int [M], as the layer makes them at `wanted`, int [M].

        Args:
            query: [..., M, Hq, D], any floating dtype; the answer has the same.
        """
        turned = query if self.gain is None else query.float() / self.gain
        turned = rotate(turned, wanted - position, self.inv_freq, self.is_neox, self.start)
        if self.gain is not None:
            turned = turned * self.gain
        if self.temperature is not None:
            factor = self.temperature.factor(wanted) / self.temperature.factor(position)
            turned = turned * factor[:, None, None]
        return turned.to(query.dtype)


@dataclass(frozen=True)
class BankWrite:
    """Where a step's text tokens go: batch token indices and ring indices, both int64 [m]."""

    token_index: torch.Tensor
    ring_index: torch.Tensor


@dataclass(frozen=True)
class BankShape:
    """What a bank holds of each query.

    Args:
        num_layers: layers (L).
        num_query_heads: query heads of this rank (Hq).
        head_size: D.
        dtype, device: of the queries.
    """

    num_layers: int
    num_query_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def queries(self, num_layers: int, count: int) -> torch.Tensor:
        """[num_layers, count, Hq, D], zeros."""
        shape = (num_layers, count, self.num_query_heads, self.head_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class ProbeBank:
    """A ring of the last `capacity` text queries.

    Args:
        shape: of its queries.
        capacity: probe queries (M).
    """

    def __init__(self, shape: BankShape, capacity: int) -> None:
        self.queries = shape.queries(shape.num_layers, capacity)
        self.positions = torch.zeros(capacity, dtype=torch.int64, device=shape.device)
        self.capacity = capacity
        self.num_written = self.num_dropped = 0

    @property
    def size(self) -> int:
        return min(self.num_written - self.num_dropped, self.capacity)

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + self.positions.nbytes

    def plan_write(self, token_indices: list[int]) -> BankWrite:
        """Reserve ring places for the text tokens of a step (the last `capacity` of them)."""
        (write,) = plan_writes([(self, token_indices)])
        return write

    def _claim(self, token_indices: list[int]) -> tuple[list[int], list[int]]:
        """The tokens that enter, and their places."""
        kept = token_indices[-self.capacity :]
        ring = [(self.num_written + i) % self.capacity for i in range(len(kept))]
        self.num_written += len(kept)
        return kept, ring

    def keep_last(self, count: int) -> None:
        """Ask with the last `count` queries alone, and with those that come."""
        self.num_dropped = max(self.num_dropped, self.num_written - count)

    def write_positions(self, write: BankWrite, positions: torch.Tensor) -> None:
        """Store the rotary positions of a step's text tokens; `positions` is int64 [T]."""
        self.positions[write.ring_index] = positions[write.token_index]

    def write_queries(self, write: BankWrite, layer: int, query: torch.Tensor) -> None:
        """Store the rotated queries of a step's text tokens; `query` is [T, Hq, D]."""
        self.queries[layer, write.ring_index] = query[write.token_index].to(self.queries.dtype)

    def take(self, write: BankWrite, queries: torch.Tensor, position: torch.Tensor) -> None:
        """Store rotated queries of all layers, [L, T, Hq, D], that share one rotary position."""
        self.queries[:, write.ring_index] = queries[:, write.token_index].to(self.queries.dtype)
        self.positions[write.ring_index] = position

    def copy(self) -> Self:
        """A bank with the same content that can be written on its own."""
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.queries = self.queries.clone()
        clone.positions = self.positions.clone()
        return clone

    def probe(
        self, layers: int | slice, next_position: torch.Tensor, rotary: Rotary | None
    ) -> torch.Tensor:
        """The bank's queries as if they were asked right behind the cached tokens.

        Args:
            layers: index of a layer, or L of them.
            next_position: int64 scalar, rotary position of the next text token.
            rotary: how queries of these layers turn; None where they do not.

        Returns:
            [size, Hq, D] or [L, size, Hq, D], oldest first, each at `next_position` plus its rank.
        """
        first = self.num_written - self.size
        rank = torch.arange(self.size, device=self.positions.device)
        index = (first + rank) % self.capacity
        queries = self.queries[layers].index_select(-3, index)
        if rotary is None:
            return queries
        return rotary.turn(queries, self.positions[index], next_position + rank)


def plan_writes(banks: Sequence[tuple[ProbeBank, list[int]]]) -> list[BankWrite]:
    """`ProbeBank.plan_write` for several banks of one device, in one copy to it."""
    if not banks:
        return []
    parts = [part for bank, token_indices in banks for part in bank._claim(token_indices)]
    numbers = [number for part in parts for number in part]
    device = banks[0][0].positions.device
    indices = upload(numbers, torch.int64, device).split([len(part) for part in parts])
    return [BankWrite(*pair) for pair in zip(indices[::2], indices[1::2], strict=True)]
