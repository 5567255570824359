"""Prompts in host memory: who keeps which, and what a new one finds there.

Content is named by vLLM's chain of block hashes, which covers tokens, items, LoRA and salt, and for
the end of an item inside a block by one link more. What a request is computing can be waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vllm_budgetkv.arithmetic.host_blocks import HostBlocks, HostPlace
from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from vllm_budgetkv.arithmetic.quota import Quota


class ItemEnd(NamedTuple):
    """The end of an item inside a block: so many tokens of the prompt, and their key."""

    stop_tokens: int
    key: Hashable


@dataclass(frozen=True)
class PromptKeys:
    """Names of the beginnings of a prompt.

    Args:
        blocks: of each whole block, in order; every one names all tokens up to its end.
        ends: of items that end inside a block, ascending.
    """

    blocks: Sequence[Hashable] = ()
    ends: Sequence[ItemEnd] = ()


class Found(NamedTuple):
    """The beginning of a prompt that host memory keeps.

    Attributes:
        num_tokens: tokens of it (m).
        blocks: whole blocks of it.
        tail_block: the block with its last m % N tokens; None if there are none.
    """

    num_tokens: int = 0
    blocks: Sequence[int] = ()
    tail_block: int | None = None


def most_reused_tokens(
    quota: Quota, prompt_tokens: int, *, probe_tokens: int, end_of_items: int
) -> int:
    """Most tokens that a prompt takes over; the rest it computes, in a chunk at least.

    Args:
        quota: of the request.
        prompt_tokens: of its prompt.
        probe_tokens: its last tokens, whose queries score the cache, so that it must compute them.
        end_of_items: tokens up to the end of its last item, behind which queries count.
    """
    wanted_tokens = max(end_of_items, prompt_tokens - probe_tokens)
    return max(0, min(wanted_tokens, quota.chunks_end(prompt_tokens) - 1))


@dataclass
class _Kept:
    """What is noted of a request in host memory: its blocks, names, and how much is written."""

    prompt_tokens: int
    keys: PromptKeys
    blocks: list[int]
    num_published: int = 0
    num_ends: int = 0


@dataclass
class HostPrompts:
    """The prompts that host memory keeps. Every request of them holds its blocks until it leaves.

    Args:
        blocks: the host blocks.
        page_tokens: tokens of a block (N).
        is_running: whether a request is computed in this step or the next, by its id.
    """

    blocks: HostBlocks
    page_tokens: int
    is_running: Callable[[str], bool]
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False)
    _writers: dict[Hashable, str] = field(default_factory=dict, init=False)
    _awaited: dict[str, Hashable] = field(default_factory=dict, init=False)

    def waits(self, request_id: str) -> bool:
        """Whether what `find` told a request to wait for is still to be written."""
        return self._is_awaited(self._awaited.get(request_id))

    def find(self, request_id: str, keys: PromptKeys, most_tokens: int) -> Found | None:
        """The longest beginning of a request's prompt that is kept, of at most so many tokens.

        None if a running request is about to write more of it, which is worth the wait.
        """
        self._awaited.pop(request_id, None)
        blocks: list[int] = []
        for key in keys.blocks:
            block = self.blocks.find(key)
            if block is None:
                break
            blocks.append(block)
        whole_tokens = len(blocks) * self.page_tokens
        if whole_tokens >= most_tokens:
            count, rest = divmod(most_tokens, self.page_tokens)
            return Found(most_tokens, blocks[:count], blocks[count] if rest else None)
        if len(blocks) < len(keys.blocks) and self._is_awaited(key := keys.blocks[len(blocks)]):
            self._awaited[request_id] = key
            return None
        return self._find_end(request_id, keys, blocks, most_tokens)

    def _find_end(
        self, request_id: str, keys: PromptKeys, blocks: list[int], most_tokens: int
    ) -> Found | None:
        """The same behind the last whole block that is kept: up to the end of an item."""
        whole_tokens = len(blocks) * self.page_tokens
        found = Found(whole_tokens, blocks)
        for end in keys.ends:
            if not whole_tokens < end.stop_tokens < whole_tokens + self.page_tokens:
                continue
            if (block := self.blocks.find(end.key)) is not None:
                found = Found(min(end.stop_tokens, most_tokens), blocks, block)
            elif self._is_awaited(end.key):
                self._awaited[request_id] = end.key
                return None
        return found

    def _is_awaited(self, key: Hashable | None) -> bool:
        return key in self._writers and self.is_running(self._writers[key])

    def has_room(self, prompt_tokens: int, found: Found) -> bool:
        """Whether a prompt can be kept, of which so much is."""
        needed = ceil_div(prompt_tokens, self.page_tokens) - len(found.blocks)
        kept = {*found.blocks, *([] if found.tail_block is None else [found.tail_block])}
        free = self.blocks.num_unheld - sum(not self.blocks.is_held(block) for block in kept)
        return needed <= free

    def admit(
        self,
        request_id: str,
        prompt_tokens: int,
        keys: PromptKeys,
        found: Found,
        stops: Sequence[int],
    ) -> HostPlace | None:
        """Hold blocks for a prompt; None, and none held, if there are too few.

        Args:
            request_id: of a request that keeps nothing yet.
            prompt_tokens: of its prompt.
            keys: of its prompt.
            found: what it begins with.
            stops: where the chunks in front of that ended.
        """
        assert request_id not in self._kept
        source = [] if found.tail_block is None else [found.tail_block]
        self.blocks.hold([*found.blocks, *source])
        fresh = self.blocks.take(ceil_div(prompt_tokens, self.page_tokens) - len(found.blocks))
        self.blocks.release(source)
        if fresh is None:
            self.blocks.release(found.blocks)
            return None
        kept = _Kept(prompt_tokens, keys, [*found.blocks, *fresh], len(found.blocks))
        self._kept[request_id] = kept
        for key in self._unwritten(kept):
            self._writers.setdefault(key, request_id)
        return HostPlace(
            blocks=tuple(kept.blocks),
            num_shared=len(found.blocks),
            num_tokens=found.num_tokens,
            tail_block=found.tail_block,
            stops=tuple(stops),
        )

    def wrote(self, request_id: str, seen_tokens: int) -> None:
        """The worker will have written so many tokens of a request before its next step begins."""
        kept = self._kept.get(request_id)
        if kept is None:
            return
        seen_tokens = min(seen_tokens, kept.prompt_tokens)
        keys, ends = kept.keys.blocks, kept.keys.ends
        while (
            kept.num_published < len(keys)
            and (kept.num_published + 1) * self.page_tokens <= seen_tokens
        ):
            self._publish(request_id, keys[kept.num_published], kept.num_published)
            kept.num_published += 1
        while kept.num_ends < len(ends) and ends[kept.num_ends].stop_tokens <= seen_tokens:
            stop_tokens, key = ends[kept.num_ends]
            self._publish(request_id, key, stop_tokens // self.page_tokens)
            kept.num_ends += 1

    def _publish(self, request_id: str, key: Hashable, index: int) -> None:
        self.blocks.publish(key, self._kept[request_id].blocks[index])
        if self._writers.get(key) == request_id:
            del self._writers[key]

    def leave(self, request_id: str) -> None:
        """Hold the blocks of a request no more; what it wrote can be found until it is taken."""
        self._awaited.pop(request_id, None)
        kept = self._kept.pop(request_id, None)
        if kept is None:
            return
        for key in self._unwritten(kept):
            if self._writers.get(key) == request_id:
                del self._writers[key]
        self.blocks.release(kept.blocks)

    def _unwritten(self, kept: _Kept) -> Iterator[Hashable]:
        yield from kept.keys.blocks[kept.num_published :]
        yield from (end.key for end in kept.keys.ends[kept.num_ends :])

    def forget_all(self) -> None:
        """Let no prompt find what was written until now."""
        self.blocks.forget_all()
        for kept in self._kept.values():
            # what is written from now on follows what nobody may find
            kept.keys = PromptKeys()
        self._writers.clear()
        self._awaited.clear()
