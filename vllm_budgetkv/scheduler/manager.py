"""The KV cache manager: admission and growth of every request stop at its quota."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_budgetkv.scheduler.spec import QuotaSpec


class QuotaManager(FullAttentionManager):
    """Counts `min(need, quota)` blocks wherever vLLM counts blocks.

    A request whose prompt will not fit takes its whole quota at admission, so its own growth never
    preempts it. A request that may outgrow the quota is private: it neither reads nor publishes
    cached blocks, because a compression would change them under their readers.
    """

    kv_cache_spec: QuotaSpec

    def __init__(self, kv_cache_spec: QuotaSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.quota_blocks = kv_cache_spec.quota_blocks
        self._private: set[str] = set()
        self._whole_quota: set[str] = set()

    @property
    def quota_tokens(self) -> int:
        return self.quota_blocks * self.block_size

    def expect(self, request_id: str, prefill_tokens: int, most_tokens: int) -> bool:
        """Note how long a request is and may become; called before it is admitted.

        Args:
            request_id: the request.
            prefill_tokens: tokens to be prefilled: the prompt, after a preemption also its output.
            most_tokens: tokens that it can have at its end.

        Returns:
            Whether the request is private.
        """
        if prefill_tokens > self.quota_tokens:
            self._whole_quota.add(request_id)
        if most_tokens > self.quota_tokens:
            self._private.add(request_id)
        return request_id in self._private

    def forget(self, request_id: str) -> None:
        """Drop the notes of a finished request."""
        self._private.discard(request_id)
        self._whole_quota.discard(request_id)

    def _capped_tokens(self, request_id: str, num_tokens: int) -> int:
        if request_id in self._whole_quota:
            return self.quota_tokens
        return min(num_tokens, self.quota_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self._capped_tokens(request_id, num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(
            request_id, self._capped_tokens(request_id, num_tokens), num_tokens_main_model
        )
        held_blocks = len(self.req_to_blocks[request_id])
        if held_blocks > self.quota_blocks:
            raise RuntimeError(
                f"request {request_id} holds {held_blocks} blocks, its quota is {self.quota_blocks}"
            )
        return blocks

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        if request.request_id in self._private:
            return
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )
