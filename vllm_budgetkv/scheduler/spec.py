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

    from vllm_budgetkv.quota import Quota


@dataclass(frozen=True, kw_only=True)
class QuotaSpec(FullAttentionSpec):
    """Full attention whose requests hold what their quota says; `quota` is the largest of them."""

    quota: Quota

    @classmethod
    def of(cls, spec: FullAttentionSpec, quota: Quota) -> QuotaSpec:
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
        assert spec.block_size == quota.page_tokens, "the quota counts blocks of another size"
        layout = PageLayout(spec.block_size, spec.head_size, spec.dtype)
        return replace_as(spec, cls, quota=quota, state_content_bytes=layout.token_bytes)

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest_tokens = vllm_config.model_config.max_model_len
        return self.quota.blocks_for(longest_tokens, longest_tokens) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[QuotaSpec]) -> QuotaSpec:
        first = specs[0]
        assert all(spec == first for spec in specs), "layers of one pool must have equal specs"
        return replace(first)


# vLLM fills its registry only while it is empty, so its own specs must come first
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(QuotaSpec, QuotaManager, uniform_type_base_spec=FullAttentionSpec)
