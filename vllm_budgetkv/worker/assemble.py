"""Put the worker's cache together once vLLM has allocated its buffer and loaded its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.layout import PageLayout, PagePool
from vllm_budgetkv.policy import make_policy
from vllm_budgetkv.rotation import inverse_frequencies
from vllm_budgetkv.worker.bank import Rotary
from vllm_budgetkv.worker.cache import BudgetCache
from vllm_budgetkv.worker.compressor import Compressor
from vllm_budgetkv.worker.slots import Slots
from vllm_budgetkv.worker.tables import HeadTables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.v1.core.sched.output import NewRequestData

    from vllm_budgetkv.config import BudgetConfig
    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.worker.report import RequestRecord


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


def _make_compressor(
    config: BudgetConfig,
    quota: Quota,
    tables: HeadTables,
    layers: Mapping[str, Any],
    layer_index: Mapping[str, int],
    model: torch.nn.Module,
) -> Compressor:
    options = config.policy_options()
    policy = make_policy(config.policy, options, quota.page_tokens)
    turns_probe = policy.needs_scores and policy.probe_source != "recent"
    compressor = Compressor(
        tables=tables,
        policy=policy,
        options=options,
        scales={layer_index[name]: layer.impl.scale for name, layer in layers.items()},
        rotaries=rotaries_of(model, layer_index) if turns_probe else {},
        poison=config.check_ledger,
    )
    if quota.compresses:
        compressor.new_layer_budgets(quota)  # refuses a model that does not fit before any request
    return compressor


def make_cache(
    *,
    config: BudgetConfig,
    quota: Quota,
    layers: Mapping[str, Any],
    model: torch.nn.Module,
    max_num_seqs: int,
    parent_of: Callable[[NewRequestData], str | None],
    writes_report: bool,
) -> BudgetCache:
    """Build the cache of one worker.

    Args:
        config: the user's options.
        quota: what one request may hold.
        layers: vLLM's attention layers by name, with `kv_cache`, `impl` and head counts.
        model: for its rotary embeddings.
        max_num_seqs: requests that may hold a slot at once.
        parent_of: id of the request that a new one looks ahead for; None for a client's.
        writes_report: whether this rank appends to the report file.

    Raises:
        ValueError: the layers do not match the quota or differ in their heads.
    """
    num_query_heads, num_heads, head_size = _heads_of(layers, quota)
    views = {name: layer.kv_cache for name, layer in layers.items()}
    dtype = next(iter(views.values())).dtype
    pool, layer_index = pool_of(views, PageLayout(quota.page_tokens, head_size, dtype))
    if config.check_ledger:
        pool.poison()
    tables = HeadTables.empty(
        pool,
        num_slots=max_num_seqs,
        num_layers=quota.num_layers,
        num_heads=num_heads,
        width_pages=quota.table_width_pages,
        quota_blocks=quota.blocks if quota.compresses else 0,
        device=pool.raw.device,
    )
    compressor = _make_compressor(config, quota, tables, layers, layer_index, model)

    def finish(record: RequestRecord) -> None:
        if config.report_file and writes_report:
            record.append_to(Path(config.report_file))

    slots = Slots(
        tables=tables,
        quota=quota,
        policy_name=config.policy,
        block_bytes=quota.num_layers * num_heads * pool.layout.page_bytes,
        parent_of_new=parent_of,
        poison=config.check_ledger,
        on_finished=finish,
    )
    return BudgetCache(
        quota=quota,
        tables=tables,
        slots=slots,
        compressor=compressor,
        num_query_heads=num_query_heads,
        check_ledger=config.check_ledger,
        reports=bool(config.report_file) and writes_report,
        layer_index=layer_index,
    )
