"""vLLM's attention on a CPU over a buffer with the block outermost, for layers with windows.

Apart from `windows.py`, because only a CPU needs it. vLLM's backend asks for the layer outermost,
but its kernels take the stride of a block from the tensor. They know one size of keys and values,
so values of fewer elements get zeros behind them, as ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_budgetkv.worker.padded_values import padded, widened

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import AttentionSpec


class CPUWindowAttention(CPUAttentionBackendImpl):
    """Adds nothing in a run without requests, as ours, and as vLLM's own on a GPU."""

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
        with widened(output, self.head_size) as wide:
            super().forward(
                layer,
                query,
                key,
                padded(value, self.head_size),
                kv_cache,
                attn_metadata,
                wide,
                output_scale,
                output_block_scale,
            )
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

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, head_size_v=spec.head_size)
