"""What one request takes: of the KV cache under a quota and without one, and of its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.layout import BlockLayout, PagePool
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.probe.bank import BankShape, ProbeBank
from vllm_budgetkv.cache.tables import HeadTables
from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.start import layer_kinds, pool_size
from vllm_budgetkv.start.resolve import layout_of

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cli.engine import PlannedEngine
    from vllm_budgetkv.start.config import BudgetConfig


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """What one request of the planned length takes of the KV cache of one worker.

    Args:
        block_bytes: of a block, all layers and KV heads of the worker.
        page_tokens: tokens of a block.
        blocks: most that it holds at any instant.
        pool_blocks: blocks of the pool; None where its size is unknown.
    """

    block_bytes: int
    page_tokens: int
    blocks: int
    pool_blocks: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that is held by all layers and KV heads."""
        return self.block_bytes // self.page_tokens

    @property
    def num_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def at_once(self) -> int | None:
        """Such requests that the pool holds together; None where its size is unknown."""
        if self.pool_blocks is None:
            return None
        return pool_size.requests_at_once(self.pool_blocks, self.blocks)


def cost_under(
    engine: PlannedEngine, quota: Quota, tokens: int, pool_bytes: int | None
) -> RequestCost:
    """A request of so many tokens, prompt and answer, under the quota."""
    return RequestCost(
        block_bytes=pool_size.block_bytes(engine, quota),
        page_tokens=quota.page_tokens,
        blocks=quota.blocks_for(tokens, tokens),
        pool_blocks=pool_size.blocks_of(engine, quota, pool_bytes),
    )


def stock_cost(engine: PlannedEngine, tokens: int, pool_bytes: int | None) -> RequestCost:
    """The same request in stock vLLM, by vLLM's own size of a page."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model, parallel = engine.model_config, engine.parallel_config
    page_tokens = engine.cache_config.block_size
    spec = FullAttentionSpec(
        block_size=page_tokens,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        head_size_v=layer_kinds.value_size(model),
        dtype=layout_of(engine).kv_dtype,
    )
    block_bytes = model.get_num_layers(parallel) * spec.page_size_bytes
    pool_blocks = engine.cache_config.num_gpu_blocks_override
    if pool_blocks is None and pool_bytes is not None:
        pool_blocks = pool_bytes // block_bytes
    return RequestCost(
        block_bytes=block_bytes,
        page_tokens=page_tokens,
        blocks=ceil_div(tokens, page_tokens),
        pool_blocks=pool_blocks,
    )


def slot_bytes(engine: PlannedEngine, config: BudgetConfig, quota: Quota) -> int:
    """Bytes of the page tables and of the probe bank of one request: made, but without memory."""
    model, parallel, layout = engine.model_config, engine.parallel_config, layout_of(engine)
    policy, nowhere = POLICIES[config.policy], torch.device("meta")
    tables = HeadTables.empty(
        PagePool(torch.empty(0, layout.page_bytes, dtype=torch.uint8, device=nowhere), layout),
        num_slots=1,
        blocks=BlockLayout(quota.num_layers, model.get_num_kv_heads(parallel), quota.block_pages),
        width_pages=quota.table_width_pages,
        quota_blocks=quota.blocks if policy.compresses else 0,
    )
    if not (policy.compresses and policy.needs_scores):
        return tables.slot_bytes
    shape = BankShape(
        num_layers=quota.num_layers,
        num_query_heads=model.get_num_attention_heads(parallel),
        head_size=layout.head_size,
        dtype=layout.dtype,
        device=nowhere,
    )
    capacity_tokens = policy.probe_source.capacity_tokens(config.policy_options())
    return tables.slot_bytes + ProbeBank(shape, capacity_tokens).nbytes
