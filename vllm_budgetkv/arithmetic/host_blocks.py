"""Host blocks: which are held, which keep what, and which go first. Integers alone, no tensor.

A block is held by the requests whose prompt it keeps, and found by keys of its content. Once nobody
holds it, it keeps its content until it is taken for another, the longest unheld first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


@dataclass(frozen=True, kw_only=True)
class HostPlace:
    """Where host memory keeps the prompt of a request, as the worker is told at its admission.

    Args:
        blocks: host blocks of the prompt, in the order of its tokens.
        num_shared: leading blocks that others may hold too; the rest is this request's to write.
        num_tokens: prompt tokens that are there already (m).
        tail_block: the block that keeps the last m % N of them, which begin the first block that is
            not shared; None if there are none.
        stops: where the chunks in front of m ended, ascending; at most m.
        found_tokens: prompt tokens that were there when it was admitted first. Chunks of them may
            be joined; those behind them it was, or may have been, compressed at.
    """

    blocks: tuple[int, ...]
    num_shared: int = 0
    num_tokens: int = 0
    tail_block: int | None = None
    stops: tuple[int, ...] = ()
    found_tokens: int = 0


@dataclass
class HostBlocks:
    """The blocks of one host memory. It changes through its verbs.

    Args:
        num_blocks: all blocks.
    """

    num_blocks: int
    _holders: list[int] = field(init=False)
    _unheld: OrderedDict[int, None] = field(init=False)
    _places: dict[Hashable, int] = field(default_factory=dict, init=False)
    _keys: dict[int, list[Hashable]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._holders = [0] * self.num_blocks
        self._unheld = OrderedDict.fromkeys(range(self.num_blocks))

    @property
    def num_unheld(self) -> int:
        """Blocks that nobody holds, whether they keep anything or not."""
        return len(self._unheld)

    @property
    def use(self) -> dict[str, int]:
        """All blocks, those that requests hold, and those that a prompt may find."""
        held = self.num_blocks - len(self._unheld)
        return {"all": self.num_blocks, "held": held, "findable": len(self._keys)}

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def find(self, key: Hashable) -> int | None:
        """The block that keeps what `key` names; None if no block does."""
        return self._places.get(key)

    def publish(self, key: Hashable, block: int) -> None:
        """Say that a held block keeps what `key` names; the first to say it wins.

        Raises:
            ValueError: nobody holds the block.
        """
        if not self.is_held(block):
            raise ValueError(f"host block {block} is nobody's")
        if key not in self._places:
            self._places[key] = block
            self._keys.setdefault(block, []).append(key)

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more."""
        for block in blocks:
            self._unheld.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> list[int] | None:
        """Hold that many blocks and forget what they keep; None, and none taken, if too few."""
        if count > len(self._unheld):
            return None
        taken = [self._unheld.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            for key in self._keys.pop(block, ()):
                del self._places[key]
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Hold blocks once less. Of those that nobody holds now, the last is taken again first.

        Raises:
            ValueError: nobody holds one of them.
        """
        for block in reversed(blocks):
            if not self.is_held(block):
                raise ValueError(f"host block {block} is nobody's")
            self._holders[block] -= 1
            if not self.is_held(block):
                self._unheld[block] = None
                # what keeps nothing is taken before what may be asked for again
                if block not in self._keys:
                    self._unheld.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Find nothing that was published until now; what is held stays held."""
        self._places.clear()
        self._keys.clear()
