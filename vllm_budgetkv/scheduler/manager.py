"""The KV cache manager: admission and growth of every request stop at its quota."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.terms import Terms


@dataclass(frozen=True)
class Expectation:
    """What is known of a request before it is admitted.

    Args:
        terms: what it is held to.
        prompt_tokens: of its prompt, without any output.
        is_private: whether it neither reads nor publishes cached blocks.
        looks_ahead: whether its text runs ahead of it, or would if host memory kept less of it.
    """

    terms: Terms
    prompt_tokens: int
    is_private: bool
    looks_ahead: bool = False

    @property
    def quota(self) -> Quota:
        return self.terms.quota


class QuotaManager(FullAttentionManager):
    """Counts the blocks of a request's quota wherever vLLM counts blocks.

    A request whose prompt will not fit takes its whole quota at admission, so its own growth never
    preempts it. A request that may outgrow the quota is private: it neither reads nor publishes
    cached blocks, because a compression would change them under their readers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # nothing behind the end of a head is read, so what a block held before never shows
        super().__init__(*args, **{**kwargs, "needs_kv_cache_zeroing": False})
        self._expected: dict[str, Expectation] = {}
        self._peak_blocks: dict[str, int] = {}

    def expect(self, request_id: str, expectation: Expectation) -> None:
        """Note what a request is; called before it is admitted, and it holds until `forget`."""
        self._expected[request_id] = expectation

    def expected(self, request_id: str) -> Expectation:
        """What was noted of a request."""
        return self._expected[request_id]

    def forget(self, request_id: str) -> None:
        """Drop the notes of a finished request."""
        self._expected.pop(request_id, None)
        self._peak_blocks.pop(request_id, None)

    def peak_blocks(self, request_id: str) -> int:
        """Most blocks that a request has held, before a preemption too."""
        return self._peak_blocks.get(request_id, 0)

    def _capped_tokens(self, request_id: str, num_tokens: int) -> int:
        expected = self._expected[request_id]
        blocks = expected.quota.blocks_for(num_tokens, expected.prompt_tokens)
        return blocks * expected.quota.block_tokens

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

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """What host memory keeps of a prompt takes no blocks: the quota is taken behind it."""

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(
            request_id, self._capped_tokens(request_id, num_tokens), num_tokens_main_model
        )
        held_blocks = len(self.req_to_blocks[request_id])
        self._peak_blocks[request_id] = max(self.peak_blocks(request_id), held_blocks)
        quota_blocks = self._expected[request_id].quota.blocks
        if held_blocks > quota_blocks:
            raise RuntimeError(
                f"request {request_id} holds {held_blocks} blocks, its quota is {quota_blocks}"
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
        if self._expected[request.request_id].is_private:
            return
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )
