"""The KV cache spec: what a layer's cache costs, and how little of it one request needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_budgetkv.layout import PageLayout
from vllm_budgetkv.scheduler.manager import QuotaManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class QuotaSpec(FullAttentionSpec):
    """Full attention whose requests hold at most `quota_blocks` blocks."""

    quota_blocks: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, quota_blocks: int) -> QuotaSpec:
        """The spec of a layer under the quota; its pages pay for all fields of a head-page.

        Raises:
            ValueError: the layer is not full attention, or its page layout is not supported.
        """
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            raise ValueError(
                f"a layer with {type(spec).__name__} cannot be served under a quota: "
                "start without --kv-policy"
            )
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"keys of {spec.head_size} and values of {spec.head_size_v} elements are not "
                "supported: start without --kv-policy"
            )
        layout = PageLayout(spec.block_size, spec.head_size, spec.dtype)
        return replace_as(
            spec, cls, quota_blocks=quota_blocks, state_content_bytes=layout.token_bytes
        )

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        quota_bytes = self.quota_blocks * self.page_size_bytes
        return min(quota_bytes, super().max_memory_usage_bytes(vllm_config))

    @classmethod
    def merge(cls, specs: list[QuotaSpec]) -> QuotaSpec:
        first = specs[0]
        assert all(spec == first for spec in specs), "layers of one pool must have equal specs"
        return replace(first)


# vLLM fills its registry only while it is empty, so its own specs must come first
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(QuotaSpec, QuotaManager, uniform_type_base_spec=FullAttentionSpec)
