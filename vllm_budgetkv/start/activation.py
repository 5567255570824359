"""Turn a `VllmConfig` into ours: checks, resolved quota, scheduler and worker class names."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.report_file import check_report_file
from vllm_budgetkv.policy.option import flag_of
from vllm_budgetkv.start import host_memory, pictures, platforms, pool_size, refusals, stored
from vllm_budgetkv.start.config import SECTION, BudgetConfig, section_of
from vllm_budgetkv.start.groups import block_pages_of, lengthen_blocks
from vllm_budgetkv.start.request_rules import RequestRules
from vllm_budgetkv.start.resolve import check_batch, check_policies, layout_of, resolve_quotas

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER_CLASS = "vllm_budgetkv.scheduler.scheduler.BudgetScheduler"

# the section beside the user's that carries the resolved quota to the engine core and the workers
RESOLVED_SECTION = f"{SECTION}_resolved"


def activate(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Make `vllm_config` serve under `config`. Mutates `vllm_config`.

    The quota is resolved here and carried, because what it follows from may change: with
    `--max-model-len auto` the engine core shortens the length once it knows the pool.

    Raises:
        ValueError: the engine configuration cannot be served, or the quota is too small for its
            chunks or too large for the pool.
    """
    refusals.check(vllm_config, config)
    stored.settle(vllm_config)
    pictures.settle(vllm_config)
    platform, parallel = platforms.current(), vllm_config.parallel_config
    if parallel.worker_cls != platform.stock_worker:
        raise ValueError(f"--worker-cls {parallel.worker_cls} would replace ours: remove it")
    scheduler = vllm_config.scheduler_config
    layout = layout_of(vllm_config)  # refuses what no head-page is made for
    is_mixed = vllm_config.model_config.is_hybrid
    block_pages = block_pages_of(vllm_config, layout) if is_mixed else 1
    rules = RequestRules(config, resolve_quotas(vllm_config, config, block_pages))
    quota = rules.default.quota
    check_policies(vllm_config, rules)
    host_memory.check(vllm_config, config)
    if is_mixed:
        lengthen_blocks(vllm_config, quota.block_tokens)
    if quota.compresses:
        largest = rules.largest(config.policy)
        pool_size.check(vllm_config, largest, vllm_config.cache_config.kv_cache_memory_bytes)
        check_batch(vllm_config, quota)
        scheduler.long_prefill_token_threshold = quota.chunk_tokens
    pictures.check(vllm_config, quota)
    vllm_config.additional_config = {
        **_additional(vllm_config),
        RESOLVED_SECTION: {name: asdict(quota) for name, quota in rules.quotas.items()},
    }
    scheduler.scheduler_cls = SCHEDULER_CLASS
    parallel.worker_cls = platform.worker
    if platform.selects_slot:
        _select_backend(vllm_config, platform.backend_slot)
    if config.report_file is not None:
        check_report_file(config.report_file)
    if config.trace_file is not None:
        check_report_file(config.trace_file, flag_of("trace_file"))


def _select_backend(vllm_config: VllmConfig, slot: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    if attention.backend is not None:
        raise ValueError(
            f"--attention-backend {attention.backend.name} would replace ours: remove it"
        )
    attention.backend = AttentionBackendEnum[slot]


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    assert isinstance(additional, dict)
    return additional


def config_of(vllm_config: VllmConfig) -> BudgetConfig:
    """The options that travel with `vllm_config` to the engine core and the workers."""
    return BudgetConfig.from_mapping(section_of(_additional(vllm_config)))


def is_active(vllm_config: VllmConfig) -> bool:
    """Whether `activate` made it ours."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and RESOLVED_SECTION in additional


def rules_of(vllm_config: VllmConfig) -> RequestRules:
    """What requests are held to, by the quotas that `activate` resolved: in every process alike."""
    resolved = _additional(vllm_config)[RESOLVED_SECTION]
    quotas = {name: Quota.of_fields(fields) for name, fields in resolved.items()}
    return RequestRules(config_of(vllm_config), quotas)


def quota_of(vllm_config: VllmConfig) -> Quota:
    """The quota of a request that asks for nothing."""
    return rules_of(vllm_config).default.quota
