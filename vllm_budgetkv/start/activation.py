"""Turn a `VllmConfig` into ours: checks, resolved quota, scheduler and worker class names."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.arithmetic.quota import Quota, least_batch_tokens
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.cache.report_file import check_report_file
from vllm_budgetkv.policy import make_policy
from vllm_budgetkv.start import host_memory, platforms, pool_size, refusals
from vllm_budgetkv.start.config import SECTION, BudgetConfig, section_of

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
    platform, parallel = platforms.current(), vllm_config.parallel_config
    if parallel.worker_cls != platform.stock_worker:
        raise ValueError(f"--worker-cls {parallel.worker_cls} would replace ours: remove it")
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    PageLayout(vllm_config.cache_config.block_size, model.get_head_size(), model.dtype)
    quota = _resolve_quota(vllm_config, config)
    _check_policy(vllm_config, config, quota)
    host_memory.check(vllm_config, config)
    if quota.compresses:
        pool_size.check(vllm_config, quota, vllm_config.cache_config.kv_cache_memory_bytes)
        _check_batch(vllm_config, quota)
        scheduler.long_prefill_token_threshold = quota.chunk_tokens
    vllm_config.additional_config = {
        **_additional(vllm_config),
        RESOLVED_SECTION: {"quota": asdict(quota)},
    }
    scheduler.scheduler_cls = SCHEDULER_CLASS
    parallel.worker_cls = platform.worker
    if platform.selects_slot:
        _select_backend(vllm_config, platform.backend_slot)
    if config.report_file is not None:
        check_report_file(config.report_file)


def _check_policy(vllm_config: VllmConfig, config: BudgetConfig, quota: Quota) -> None:
    """Build what each worker builds: the policy, with the files that it reads."""
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


def _resolve_quota(vllm_config: VllmConfig, config: BudgetConfig) -> Quota:
    """The quota in numbers.

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
        chunk_tokens=min(config.chunk_tokens, max_model_len),
        decode_interval_tokens=config.decode_interval_tokens,
        # no request outgrows a quota that holds the longest
        compresses=config.compresses and blocks * page_tokens < max_model_len,
        retrieves=config.retrieves or config.host_bytes > 0,
        recall=_recall_of(vllm_config, config),
    )


def _recall_of(vllm_config: VllmConfig, config: BudgetConfig) -> Recall | None:
    """What of a quota brings tokens back; None where no host memory keeps any."""
    if not config.host_bytes:
        return None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layout = PageLayout(vllm_config.cache_config.block_size, model.get_head_size(), model.dtype)
    options = config.policy_options()
    all_heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    return Recall(
        num_heads=max(1, round(options.recall_heads_share * all_heads)),
        all_heads=all_heads,
        index_tokens=layout.index_tokens,
        slots_share=options.recall_share,
        max_index_share=options.recall_index_share,
    )


def _check_batch(vllm_config: VllmConfig, quota: Quota) -> None:
    """Raise unless a step has room for a whole chunk beside a token of every other request."""
    scheduler = vllm_config.scheduler_config
    batch_tokens, num_others = scheduler.max_num_batched_tokens, scheduler.max_num_seqs - 1
    flag = "--max-num-batched-tokens"
    if scheduler.max_num_scheduled_tokens is not None:
        # what a step may schedule, where it is less than what the worker's buffers hold
        batch_tokens, flag = scheduler.max_num_scheduled_tokens, "--max-num-scheduled-tokens"
    least_tokens = least_batch_tokens(quota.chunk_tokens, scheduler.max_num_seqs)
    if batch_tokens < least_tokens:
        raise ValueError(
            f"{flag} {batch_tokens} has no room for a chunk of "
            f"{quota.chunk_tokens} tokens beside the {num_others} other requests that "
            f"--max-num-seqs {scheduler.max_num_seqs} allows: remove it or set it to at least "
            f"{least_tokens}, or lower --max-num-seqs or --kv-chunk-tokens (now together at most "
            f"{batch_tokens + 1})"
        )


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    assert isinstance(additional, dict)
    return additional


def config_of(vllm_config: VllmConfig) -> BudgetConfig:
    """The options that travel with `vllm_config` to the engine core and the workers."""
    return BudgetConfig.from_mapping(section_of(_additional(vllm_config)))


def quota_of(vllm_config: VllmConfig) -> Quota:
    """The quota that `activate` resolved, the same in every process."""
    resolved = dict(_additional(vllm_config)[RESOLVED_SECTION]["quota"])
    recall = resolved.pop("recall")
    return Quota(**resolved, recall=None if recall is None else Recall(**recall))
