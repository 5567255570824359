"""The KV cache spec: what a layer's cache costs, and how little of it one request needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    SlidingWindowSpec,
    iter_layer_specs,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.scheduler.manager import QuotaManager
from vllm_budgetkv.start.pool_size import Windows

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from vllm_budgetkv.arithmetic.quota import Quota


# fields of a full-attention spec that a page serves; any other must have its default
FREE_FIELDS = {"block_size", "num_kv_heads", "head_size", "dtype", "dcp_sharded", "max_tp_shards"}
# how keys and values may be stored: as they are computed, or in 8 bits with a scale for a layer
STORED = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)

# what a field means, where the name does not tell
MEANINGS = {
    "sliding_window": "a sliding window of {} tokens",
    "attention_chunk_size": "attention in chunks of {} tokens",
    "non_causal": "tokens that attend to later ones",
    "head_size_v": "values of {} elements, other than its keys",
    "kv_quant_mode": "a quantised cache ({!r})",
}

# and the specs of other kinds, by class
KINDS = {
    "SlidingWindowSpec": "a sliding window",
    "ChunkedLocalAttentionSpec": "attention in chunks",
    "RSWASpec": "a sliding window behind the prompt",
    "SinkFullAttentionSpec": "learned attention sinks",
    "MLAAttentionSpec": "MLA",
    "CrossAttentionSpec": "cross attention",
    "MambaSpec": "recurrent state",
}


# specs of layers that bound their own cache
WINDOWS = (SlidingWindowSpec, ChunkedLocalAttentionSpec)


@dataclass(frozen=True, kw_only=True)
class QuotaSpec(FullAttentionSpec):
    """Full attention whose requests hold what their quota says.

    Values of fewer elements than keys are stored with zeros behind them, so `head_size_v` is
    `head_size`.

    Attributes:
        quota: the largest of theirs.
        encoder_tokens: embeddings that the encoder makes in a step and keeps, as the worker says
            once it has found that its model's tower sees frames alone; 0 where videos are whole.
    """

    quota: Quota
    encoder_tokens: int = 0

    @classmethod
    def of(
        cls,
        spec: FullAttentionSpec,
        quota: Quota,
        computed: torch.dtype | None = None,
        *,
        pads_values: bool = False,
    ) -> QuotaSpec:
        """The spec of a layer under the quota; its pages pay for all fields of a head-page.

        Args:
            spec: vLLM's.
            quota: the largest of a request.
            computed: dtype that the model computes in; None if keys and values are stored so.
            pads_values: whether values may have fewer elements than keys.

        Raises:
            ValueError: the layer is not plain full attention, or its page layout is not supported.
        """
        if pads_values and spec.head_size_v < spec.head_size:
            spec = replace(spec, head_size_v=spec.head_size)
        if foreign := foreign_to(spec):
            raise ValueError(
                f"a layer of the model has {', '.join(foreign)}, which no quota covers: start "
                "without --kv-policy"
            )
        # vLLM asks for a token alone, too, to make blocks as long as recurrent state
        assert spec.block_size in (quota.block_tokens, 1), "the quota counts blocks of another size"
        is_quantised = spec.kv_quant_mode != KVQuantMode.NONE
        layout = PageLayout(quota.page_tokens, spec.head_size, computed or spec.dtype, is_quantised)
        return replace_as(
            spec,
            cls,
            quota=quota,
            state_content_bytes=layout.token_bytes,
            # where blocks are longer than ours, for layers of other kinds, ours are whole pages
            block_stride_alignment=layout.page_bytes,
        )

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


def our_group(config: KVCacheConfig) -> int:
    """Which of the groups of layers that share the pool is that under the quota.

    Raises:
        RuntimeError: none, or several, so that no block is of all of our layers.
    """
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    found = [index for index, spec in enumerate(specs) if is_ours(spec)]
    if len(found) != 1:
        raise RuntimeError(
            f"the layers under the quota are {len(found)} of {len(specs)} groups of vLLM's, but "
            "must be one: start without --kv-policy"
        )
    return found[0]


def blocks_beside(config: KVCacheConfig, vllm_config: VllmConfig) -> int:
    """Blocks that a request holds at most in groups that are not under the quota."""
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return sum(_blocks_of(spec, vllm_config) for spec in specs if not is_ours(spec))


def is_ours(spec: KVCacheSpec) -> bool:
    """Whether a spec, of a layer or of a group, is of layers under the quota."""
    return all(isinstance(of_layer, QuotaSpec) for of_layer in iter_layer_specs(spec))


def windows_of(specs: Iterable[KVCacheSpec], vllm_config: VllmConfig) -> Windows | None:
    """What layers with windows take, before vLLM forms groups; None if there are none.

    As many of those with sliding windows share a block as fit what the others need; all with
    chunks do.

    Args:
        specs: of all layers of a model.
        vllm_config: of the engine.
    """
    counts = Counter(specs)
    beside = {spec: count for spec, count in counts.items() if isinstance(spec, WINDOWS)}
    if not beside:
        return None
    (ours,) = (spec for spec in counts if is_ours(spec))
    widest = max(
        spec.page_size_bytes * (1 if isinstance(spec, SlidingWindowSpec) else count)
        for spec, count in counts.items()
    )
    groups = {
        spec: -(-count // (widest // spec.page_size_bytes))
        if isinstance(spec, SlidingWindowSpec)
        else 1
        for spec, count in beside.items()
    }
    unit = ours.get_block_stride_alignment()
    return Windows(
        blocks=sum(count * _blocks_of(spec, vllm_config) for spec, count in groups.items()),
        block_bytes=-(-widest // unit) * unit,
    )


def _blocks_of(spec: KVCacheSpec, vllm_config: VllmConfig) -> int:
    return -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)


def foreign_to(spec: KVCacheSpec) -> list[str]:
    """What a layer's spec asks for beyond plain full attention; empty if nothing."""
    if type(spec) is not FullAttentionSpec:
        name = type(spec).__name__
        return [KINDS.get(name, f"a cache of another kind ({name})")]
    plain = FullAttentionSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
    )
    asked = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return [
        MEANINGS.get(name, f"a cache with {name} {{!r}}").format(value)
        for name, value in asked.items()
        if name not in FREE_FIELDS
        and value != getattr(plain, name)
        and not (name == "kv_quant_mode" and value in STORED)
    ]


# vLLM fills its registry only while it is empty, so its own specs must come first
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(QuotaSpec, QuotaManager, uniform_type_base_spec=FullAttentionSpec)
