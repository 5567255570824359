"""A plan for scripts: one object, all sizes in bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.cli.serve_line import serve_line

if TYPE_CHECKING:
    from vllm_budgetkv.cli.figures import Figure
    from vllm_budgetkv.cli.plan import Plan, RequestCost


def as_json_object(plan: Plan) -> dict[str, Any]:
    """The plan; what is unknown is null."""
    engine, quota = plan.engine, plan.quota
    model, parallel = engine.model_config, engine.parallel_config
    return {
        "model": {
            "name": plan.wishes.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_layers": quota.num_layers,
            "num_kv_heads": model.get_num_kv_heads(parallel),
            "head_size": model.get_head_size(),
            "max_model_len": model.max_model_len,
            "tensor_parallel_size": parallel.tensor_parallel_size,
        },
        "request_tokens": plan.tokens,
        "concurrency": plan.wishes.concurrency,
        "quota": {
            "blocks": quota.blocks,
            "page_tokens": quota.page_tokens,
            "chunk_tokens": quota.chunk_tokens,
            "budget_tokens": quota.budget_tokens,
            "kept_tokens": plan.kept_tokens,
            "min_blocks": quota.min_blocks,
            "compresses": quota.compresses,
            "is_suggested": plan.choice.is_suggested,
            "is_needed": plan.choice.is_needed,
            "reason": plan.choice.reason,
            "policy": plan.choice.config.policy,
        },
        "under_quota": _of_cost(plan.cost),
        "full_cache": _of_cost(plan.stock),
        "slot_bytes": plan.slot_bytes,
        "pool": _of_pool(plan),
        "encoder": _of_encoder(plan),
        "host_memory": None if plan.host is None else asdict(plan.host),
        "serve": serve_line(plan),
    }


def _of_cost(cost: RequestCost) -> dict[str, Any]:
    return {
        "block_bytes": cost.block_bytes,
        "token_bytes": cost.token_bytes,
        "blocks": cost.blocks,
        "bytes": cost.num_bytes,
        "pool_blocks": cost.pool_blocks,
        "requests_at_once": cost.at_once,
    }


def _of_figure(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"bytes": figure.num_bytes, "origin": str(figure.origin), "from": figure.source}


def _of_pool(plan: Plan) -> dict[str, Any] | None:
    pool = plan.pool
    if pool is None:
        return None
    return {
        "bytes": pool.num_bytes,
        "is_estimate": pool.is_estimate,
        "total": _of_figure(pool.total),
        "shares": {name: _of_figure(share) for name, share in pool.shares.items()},
    }


def _of_encoder(plan: Plan) -> dict[str, Any] | None:
    encoder = plan.encoder
    if encoder is None:
        return None
    return {
        "item_tokens": dict(encoder.item_tokens),
        "cache_tokens": encoder.cache_tokens or None,
        "whole_tokens": encoder.whole_tokens,
        "cache": _of_figure(encoder.cache),
        "tower": _of_figure(encoder.tower),
        "unknown": list(encoder.unknown),
    }
