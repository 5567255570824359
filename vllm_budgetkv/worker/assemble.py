"""The engine's model as the cache sees it: one pool, layers by index, heads, scales, rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.layout import PageLayout, PagePool
from vllm_budgetkv.rotation import inverse_frequencies
from vllm_budgetkv.worker.bank import Rotary
from vllm_budgetkv.worker.build import Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.quota import Quota


def pool_of(
    views: Mapping[str, torch.Tensor], layout: PageLayout
) -> tuple[PagePool, dict[str, int]]:
    """The whole head-page pool, seen through the views that vLLM gave its layers.

    Args:
        views: per layer, [blocks, H, N, content], all of one buffer with the block outermost.
        layout: of a head-page.

    Returns:
        The pool and the index of each layer inside a block.

    Raises:
        RuntimeError: the buffer is not laid out as expected (`BLHNC`).
    """
    first = min(views.values(), key=lambda view: view.data_ptr())
    num_blocks, num_heads = first.shape[:2]
    layer_bytes = num_heads * layout.page_bytes
    num_pages = num_blocks * len(views) * num_heads
    base = first.untyped_storage()
    offset_bytes = first.data_ptr() - base.data_ptr()
    index = {}
    for name, view in views.items():
        layer, rest = divmod(view.data_ptr() - first.data_ptr(), layer_bytes)
        block_bytes = view.stride(0) * view.element_size()
        if rest or layer >= len(views) or block_bytes != len(views) * layer_bytes:
            raise RuntimeError(
                f"layer {name} starts {view.data_ptr() - first.data_ptr()} bytes into the pool "
                f"with {block_bytes} bytes per block; expected {len(views)} layers of "
                f"{layer_bytes} bytes: unset VLLM_KV_CACHE_LAYOUT"
            )
        index[name] = layer
    raw = torch.empty(0, dtype=torch.uint8, device=first.device).set_(
        base, offset_bytes, (num_pages, layout.page_bytes), (layout.page_bytes, 1)
    )
    return PagePool(raw, layout), index


def rotaries_of(model: torch.nn.Module, layer_index: Mapping[str, int]) -> dict[int, Rotary]:
    """The rotary embedding next to each attention layer; empty if the model has none.

    Raises:
        ValueError: an embedding has no table of cosines and sines to read.
    """
    found = {}
    known: dict[int, Rotary] = {}
    for module in model.modules():
        embedding = getattr(module, "rotary_emb", None)
        if embedding is None:
            continue
        for child in module.children():
            layer = layer_index.get(getattr(child, "layer_name", ""))
            if layer is not None:
                # one object for all layers that share an embedding, so that they turn at once
                if id(embedding) not in known:
                    known[id(embedding)] = _rotary(embedding)
                found[layer] = known[id(embedding)]
    return found


def _rotary(embedding: Any) -> Rotary:
    table = getattr(embedding, "cos_sin_cache", None)
    if table is None:
        raise ValueError(
            f"{type(embedding).__name__} keeps no cos_sin_cache, so stored queries cannot be "
            "turned: use --kv-policy window"
        )
    return Rotary(inverse_frequencies(table), bool(embedding.is_neox_style))


def _heads_of(layers: Mapping[str, Any], quota: Quota) -> tuple[int, int, int]:
    """Query heads, KV heads and head size, which all layers must share."""
    if len(layers) != quota.num_layers:
        raise ValueError(
            f"the model has {len(layers)} KV layers, the quota is for {quota.num_layers}"
        )
    impls = [layer.impl for layer in layers.values()]
    shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in impls}
    if len(shapes) != 1:
        raise ValueError(f"layers with different heads are not supported: {sorted(shapes)}")
    return shapes.pop()


def model_of(
    layers: Mapping[str, Any], model: torch.nn.Module, quota: Quota, *, turns_probe: bool
) -> Model:
    """What the cache must know of the engine's model, whose buffer is allocated.

    Args:
        layers: the engine's attention layers by name, with `kv_cache`, `impl` and head counts.
        model: for its rotary embeddings.
        quota: for as many layers.
        turns_probe: whether queries are turned, so that the embeddings must be understood.

    Raises:
        ValueError: the layers do not match the quota or differ in their heads.
    """
    num_query_heads, num_heads, head_size = _heads_of(layers, quota)
    views = {name: layer.kv_cache for name, layer in layers.items()}
    dtype = next(iter(views.values())).dtype
    pool, layer_index = pool_of(views, PageLayout(quota.page_tokens, head_size, dtype))
    return Model(
        pool=pool,
        layer_index=layer_index,
        scales={layer_index[name]: layer.impl.scale for name, layer in layers.items()},
        rotaries=rotaries_of(model, layer_index) if turns_probe else {},
        num_query_heads=num_query_heads,
        num_heads=num_heads,
    )
