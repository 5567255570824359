"""Turn a `VllmConfig` into ours: checks, resolved quota, scheduler and worker class names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv import platforms, pool_size, refusals
from vllm_budgetkv.config import SECTION, BudgetConfig
from vllm_budgetkv.layout import PageLayout
from vllm_budgetkv.policy import make_policy
from vllm_budgetkv.quota import Quota
from vllm_budgetkv.report_file import check_report_file

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER_CLASS = "vllm_budgetkv.scheduler.scheduler.BudgetScheduler"


def activate(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Make `vllm_config` serve under `config`. Mutates `vllm_config`.

    Raises:
        ValueError: the engine configuration cannot be served, or the quota is too small for its
            chunks or too large for the pool.
    """
    refusals.check(vllm_config, config)
    platform, parallel = platforms.current(), vllm_config.parallel_config
    if parallel.worker_cls != platform.stock_worker:
        raise ValueError(f"--worker-cls {parallel.worker_cls} would replace ours: remove it")
    scheduler = vllm_config.scheduler_config
    if config.compresses:
        scheduler.long_prefill_token_threshold = _chunk_tokens(vllm_config, config)
    model = vllm_config.model_config
    PageLayout(vllm_config.cache_config.block_size, model.get_head_size(), model.dtype)
    _check_policy(vllm_config, config)
    if config.compresses:
        quota = resolve_quota(vllm_config, config)
        pool_size.check(vllm_config, quota, vllm_config.cache_config.kv_cache_memory_bytes)
    scheduler.scheduler_cls = SCHEDULER_CLASS
    parallel.worker_cls = platform.worker
    if platform.selects_slot:
        _select_backend(vllm_config, platform.backend_slot)
    if config.report_file is not None:
        check_report_file(config.report_file)


def _check_policy(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Build what each worker builds: the quota, and the policy with the files that it reads."""
    quota = resolve_quota(vllm_config, config)
    if not quota.compresses:
        return
    policy = make_policy(config.policy, config.policy_options(), quota.page_tokens)
    num_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    policy.layer_budgets(quota.num_layers, num_heads, quota.budget_tokens)


def _select_backend(vllm_config: VllmConfig, slot: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    if attention.backend is not None:
        raise ValueError(
            f"--attention-backend {attention.backend.name} would replace ours: remove it"
        )
    attention.backend = AttentionBackendEnum[slot]


def _chunk_tokens(vllm_config: VllmConfig, config: BudgetConfig) -> int:
    return min(
        config.chunk_tokens,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
    )


def resolve_quota(vllm_config: VllmConfig, config: BudgetConfig) -> Quota:
    """The quota in numbers, the same in every process.

    Raises:
        ValueError: the quota leaves no budget for what survives.
    """
    page_tokens = vllm_config.cache_config.block_size
    max_model_len = vllm_config.model_config.max_model_len
    blocks = config.quota_blocks(page_tokens, max_model_len)
    return Quota(
        blocks=blocks,
        page_tokens=page_tokens,
        num_layers=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        chunk_tokens=_chunk_tokens(vllm_config, config),
        decode_interval_tokens=config.decode_interval_tokens,
        # no request outgrows a quota that holds the longest
        compresses=config.compresses and blocks * page_tokens < max_model_len,
    )


def config_of(vllm_config: VllmConfig) -> BudgetConfig:
    """The options that travel with `vllm_config` to the engine core and the workers."""
    additional = vllm_config.additional_config
    assert isinstance(additional, dict)
    return BudgetConfig.from_mapping(additional[SECTION])
