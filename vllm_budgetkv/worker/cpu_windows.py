"""vLLM's attention on a CPU over a buffer with the block outermost, for layers with windows.

Apart from `windows.py`, because only a CPU needs it. vLLM's backend asks for the layer outermost,
but its kernels take the stride of a block from the tensor. They know one size of keys and values,
so values of fewer elements get zeros behind them, as ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_budgetkv.worker.cpu_pictures import PictureRows
from vllm_budgetkv.worker.padded_values import padded, widened

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass
class CPUWindowMetadata(CPUAttentionMetadata):
    """vLLM's, and tokens of pictures that attend both ways; None without any."""

    pictures: PictureRows | None = None


class CPUWindowMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds both."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUWindowMetadata:
        def build(common: CommonAttentionMetadata) -> CPUAttentionMetadata:
            return super(CPUWindowMetadataBuilder, self).build(0, common)

        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        pictures = PictureRows.of(common_attn_metadata, build)
        of_batch = {each.name: getattr(metadata, each.name) for each in fields(metadata)}
        return CPUWindowMetadata(**of_batch, pictures=pictures)


class CPUWindowAttention(CPUAttentionBackendImpl):
    """Adds nothing in a run without requests, as ours, and as vLLM's own on a GPU.

    Tokens of pictures attend both ways, as in vLLM's own backends on a GPU.
    """

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.zero_()
        cache = key, padded(value, self.head_size), kv_cache
        scales = output_scale, output_block_scale
        with widened(output, self.head_size) as wide:
            super().forward(layer, query, *cache, attn_metadata, wide, *scales)
            if (pictures := attn_metadata.pictures) is not None:
                asked = query[pictures.tokens]
                seen = torch.empty_like(wide[pictures.tokens])
                super().forward(layer, asked, *cache, pictures.metadata, seen, *scales)
                wide[pictures.tokens] = seen
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(
            layer, key, padded(value, self.head_size), kv_cache, slot_mapping
        )


class CPUWindowBackend(CPUAttentionBackend):
    """`CPUAttentionBackend` in the buffer that our layers need."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUWindowAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUWindowMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, head_size_v=spec.head_size)
