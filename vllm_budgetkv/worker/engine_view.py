"""The engine's model as the cache sees it: one pool, layers by index, heads, scales, rotations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.arithmetic.layout import BlockLayout, PageLayout, PagePool
from vllm_budgetkv.cache.build import Model
from vllm_budgetkv.start.stored import QUANTISED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.arithmetic.quota import Quota


def pool_of(
    views: Mapping[str, torch.Tensor], layout: PageLayout, block_pages: int
) -> tuple[PagePool, BlockLayout, dict[str, int]]:
    """The whole head-page pool, seen through the views that vLLM gave its layers.

    Args:
        views: per layer, [blocks, H, m * N, content], all of one buffer with the block outermost.
        layout: of a head-page.
        block_pages: head-pages of a head in a block (m).

    Returns:
        The pool, which of its pages a block is, and the index of each layer inside a block.

    Raises:
        RuntimeError: the buffer is not laid out as expected (`BLHNC`).
    """
    first = min(views.values(), key=lambda view: view.data_ptr())
    num_blocks, num_heads = first.shape[:2]
    used = BlockLayout(len(views), num_heads, block_pages)
    block_bytes = first.stride(0) * first.element_size()
    unused_pages = block_bytes // layout.page_bytes - used.used_pages
    blocks = replace(used, unused_pages=max(0, unused_pages))
    base, index = first.untyped_storage(), {}
    layer_bytes = num_heads * block_pages * layout.page_bytes
    expected_bytes = blocks.stride_pages * layout.page_bytes
    for name, view in views.items():
        layer, rest = divmod(view.data_ptr() - first.data_ptr(), layer_bytes)
        if rest or layer >= len(views) or view.stride(0) * view.element_size() != expected_bytes:
            raise RuntimeError(
                f"layer {name} starts {view.data_ptr() - first.data_ptr()} bytes into the pool "
                f"with {block_bytes} bytes per block; expected {len(views)} layers of "
                f"{layer_bytes} bytes: unset VLLM_KV_CACHE_LAYOUT"
            )
        index[name] = layer
    offset_bytes = first.data_ptr() - base.data_ptr()
    num_pages = num_blocks * blocks.stride_pages
    raw = torch.empty(0, dtype=torch.uint8, device=first.device).set_(
        base, offset_bytes, (num_pages, layout.page_bytes), (layout.page_bytes, 1)
    )
    return PagePool(raw, layout), blocks, index


def heads_of(layers: Mapping[str, Any], quota: Quota) -> tuple[int, int, int]:
    """Query heads, KV heads and head size, which all layers must share.

    Args:
        layers: vLLM's attention layers by name, with `impl` and its head counts.
        quota: of the engine.

    Raises:
        ValueError: the layers differ, or there are more or fewer than the quota counts on.
    """
    if len(layers) != quota.num_layers:
        raise ValueError(
            f"the model has {len(layers)} layers with a cache, its configuration says "
            f"{quota.num_layers}: start without --kv-policy"
        )
    impls = [layer.impl for layer in layers.values()]
    shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in impls}
    if len(shapes) != 1:
        raise ValueError(
            "layers with different heads are not supported, here (query heads, KV heads, head "
            f"size) are {sorted(shapes)}: start without --kv-policy"
        )
    return shapes.pop()


def model_of(layers: Mapping[str, Any], quota: Quota, group: int, computed: torch.dtype) -> Model:
    """What the cache must know of the engine's model, whose buffer is allocated, but rotations.

    Args:
        layers: the engine's attention layers by name, with `kv_cache`, `impl` and head counts.
        quota: for as many layers.
        group: of the lists of blocks that the engine keeps of a request, which is theirs.
        computed: dtype that the model computes in.

    Raises:
        ValueError: the layers do not match the quota or differ in their heads.
    """
    num_query_heads, _, head_size = heads_of(layers, quota)
    views = {name: layer.kv_cache for name, layer in layers.items()}
    is_quantised = any(layer.impl.kv_cache_dtype in QUANTISED for layer in layers.values())
    layout = PageLayout(quota.page_tokens, head_size, computed, is_quantised)
    pool, blocks, layer_index = pool_of(views, layout, quota.block_pages)
    return Model(
        pool=pool,
        blocks=blocks,
        layer_index=layer_index,
        scales={layer_index[name]: layer.impl.scale for name, layer in layers.items()},
        rotaries={},
        num_query_heads=num_query_heads,
        group=group,
        soft_caps={
            layer_index[name]: layer.impl.soft_cap
            for name, layer in layers.items()
            if layer.impl.soft_cap
        },
        sinks={
            layer_index[name]: layer.impl.sinks.detach()
            for name, layer in layers.items()
            if layer.impl.sinks is not None
        },
        units={layer_index[name]: units_of(name, layers[name]) for name in layers if is_quantised},
    )


def units_of(name: str, layer: Any) -> tuple[float, float]:
    """What a stored key and a stored value of 1 stand for in a layer whose pages have 8 bits.

    Raises:
        ValueError: the checkpoint has scales that are none.
    """
    units = layer._k_scale_float, layer._v_scale_float
    if not all(0 < unit < math.inf for unit in units):
        raise ValueError(
            f"the checkpoint scales keys and values of layer {name} by {units[0]} and {units[1]}, "
            "which must be positive: use --kv-cache-dtype bfloat16 with --dtype bfloat16"
        )
    return units
