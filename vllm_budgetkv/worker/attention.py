"""What a layer does with its queries, keys and values: append, attend, compress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_budgetkv.cache.step import Step
from vllm_budgetkv.worker import padded_values

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import AttentionLayer

    from vllm_budgetkv.cache.cache import BudgetCache

# what an argument means that vLLM gives to some implementations only
EXTRAS = {
    "dual_chunk_attention_config": "dual chunk attention",
    "layer_idx": "attention that depends on the layer",
    "use_alibi_sqrt": "ALiBi",
    "chunk_lookback": "attention in chunks",
}


class Listener(Protocol):
    """Hears the queries of every layer in a run without requests."""

    def hear(self, layer_name: str, query: torch.Tensor) -> None:
        """Take `query`, [T, Hq, D] or [T, Hq * D], rotated, of a layer."""


class BudgetAttention(AttentionImpl[Step]):
    """Attention of one layer over per-head pages.

    Raises:
        ValueError: the layer needs something the kernels do not do.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.soft_cap = logits_soft_cap or 0.0
        # [Hq]; weights, which are loaded later
        self.sinks = sinks
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        # the worker fills it once vLLM has allocated the cache
        self.cache: BudgetCache | None = None
        # set for a run without requests that somebody listens to
        self.listener: Listener | None = None
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "layers that share their cache": kv_sharing_target_layer_name is not None,
            f"{getattr(attn_type, 'value', attn_type)} attention": (
                attn_type != AttentionType.DECODER
            ),
            # a new argument of vLLM's may change the mathematics, so none is ignored
            **{EXTRAS.get(name, f"attention with {name}"): True for name in extra},
        }
        found = [name for name, present in unsupported.items() if present]
        if found:
            raise ValueError(
                f"the model uses {', '.join(found)}, which a KV quota does not support: start "
                "without --kv-policy"
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the layer's pages and compress them where a chunk ends.

        Args:
            layer: the layer; its name finds its index in the pool.
            query: [T, Hq, D], rotated. key: [T, H, D]. value: [T, H, Dv], Dv at most D.
            kv_cache: vLLM's view of the layer, unused: pages are found through our tables.
            attn_metadata: the step; None in a dummy run, which holds no request.
            output: [T, Hq, Dv] or [T, Hq * Dv], written.

        Raises:
            RuntimeError: requests run, but nothing says which tokens are theirs.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported")
        if attn_metadata is None:
            if self.cache is not None and self.cache.plans:
                raise RuntimeError(
                    f"vLLM ran layer {layer.layer_name} for {len(self.cache.plans)} requests "
                    "without the metadata of this plugin: start without --kv-policy"
                )
            if self.listener is not None:
                self.listener.hear(layer.layer_name, query)
            return output.zero_()
        out = output.view(-1, self.num_heads, value.shape[-1])
        value = padded_values.padded(value, self.head_size)
        with padded_values.widened(out, self.head_size) as wide:
            attn_metadata.run_layer(layer.layer_name, query, key, value, wide)
        return output
