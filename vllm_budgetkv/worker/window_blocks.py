"""Blocks of layers with windows, cleared where they were blocks of ours before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.scheduler.spec import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class WindowBlocks:
    """Gives groups of layers with windows blocks without our bytes.

    vLLM's kernels multiply what stands behind the last token by zero, and a position of ours, read
    as a value, may be no number.

    Args:
        raw: uint8 [blocks, bytes], the pool.
        block_tokens: of each such group, by its index.
    """

    raw: torch.Tensor
    block_tokens: dict[int, int]

    @classmethod
    def of(cls, raw: torch.Tensor, config: KVCacheConfig) -> WindowBlocks:
        """Those of a pool.

        Args:
            raw: uint8 [P, page bytes], its head-pages.
            config: which groups share it.
        """
        specs = enumerate(group.kv_cache_spec for group in config.kv_cache_groups)
        sizes = {index: spec.block_size for index, spec in specs if not is_ours(spec)}
        return cls(raw.view(config.num_blocks, -1), sizes)

    def clear(self, scheduled: SchedulerOutput) -> None:
        """Fill blocks with zeros that a step gives to requests anew. Mutates the pool."""
        if found := {block for ids in self._given(scheduled) for block in ids}:
            self.raw.index_fill_(0, upload(sorted(found), torch.int64, self.raw.device), 0)

    def _given(self, scheduled: SchedulerOutput) -> Iterator[list[int]]:
        """Block ids that a step gives, but for those that hold what the cache found."""
        cached = scheduled.scheduled_cached_reqs
        for group, tokens in self.block_tokens.items():
            for new in scheduled.scheduled_new_reqs:
                yield new.block_ids[group][new.num_computed_tokens // tokens :]
            grown = zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
            for request_id, blocks, computed_tokens in grown:
                if blocks is not None:
                    is_resumed = request_id in cached.resumed_req_ids
                    first = computed_tokens // tokens if is_resumed else 0
                    yield blocks[group][first:]
