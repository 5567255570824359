"""The quota in numbers, and what must hold for it: at an engine's start, and in a plan of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.quota import Quota, least_batch_tokens
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.policy import make_policy
from vllm_budgetkv.start import stored
from vllm_budgetkv.start.engine_config import step_tokens
from vllm_budgetkv.start.groups import groups_of, page_tokens_of

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PageLayout
    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig
    from vllm_budgetkv.start.request_rules import RequestRules


def layout_of(engine: EngineConfig) -> PageLayout:
    """Where the bytes of a head-page lie, of as many tokens as the options say.

    Raises:
        ValueError: the page size, head size or dtype is not supported.
    """
    return stored.layout_of(engine, page_tokens_of(engine))


def resolve_quota(engine: EngineConfig, config: BudgetConfig, block_pages: int = 1) -> Quota:
    """The quota in numbers.

    Args:
        engine: its configuration.
        config: the options.
        block_pages: head-pages of a head in a block (m).

    Raises:
        ValueError: the quota leaves no budget for what survives.
    """
    page_tokens = page_tokens_of(engine)
    block_tokens = block_pages * page_tokens
    max_model_len = engine.model_config.max_model_len
    blocks = config.quota_blocks(block_tokens, max_model_len)
    return Quota(
        blocks=blocks,
        page_tokens=page_tokens,
        num_layers=groups_of(engine).num_layers,
        chunk_tokens=min(config.chunk_tokens, max_model_len),
        decode_interval_tokens=config.decode_interval_tokens,
        # no request outgrows a quota that holds the longest
        compresses=config.compresses and blocks * block_tokens < max_model_len,
        retrieves=config.retrieves or config.host_bytes > 0,
        recall=_recall_of(engine, config),
        block_pages=block_pages,
    )


def resolve_quotas(
    engine: EngineConfig, config: BudgetConfig, block_pages: int = 1
) -> dict[str, Quota]:
    """The quotas of requests that ask for no other, by the policies; see `resolve_quota`.

    Raises:
        ValueError: the quota leaves no budget for what survives.
    """
    return {
        name: resolve_quota(engine, config.of_policy(name), block_pages) for name in config.policies
    }


def _recall_of(engine: EngineConfig, config: BudgetConfig) -> Recall | None:
    """What of a quota brings tokens back; None where no host memory keeps any."""
    if not config.host_bytes:
        return None
    model, parallel = engine.model_config, engine.parallel_config
    options = config.policy_options()
    layout = layout_of(engine)
    all_heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    return Recall(
        num_heads=max(1, round(options.recall_heads_share * all_heads)),
        all_heads=all_heads,
        page_words=layout.page_words,
        code_words=layout.code_words,
        slots_share=options.recall_share,
        max_index_share=options.recall_index_share,
        rereads_all=options.recall_prefill == "all",
        question_tokens=0 if options.recall_prefill == "none" else config.lookahead_tokens,
    )


def check_policies(engine: EngineConfig, rules: RequestRules) -> None:
    """Build what each worker builds: the policies, with the files that they read.

    Raises:
        ValueError: a policy does not fit the model or the quota.
    """
    num_heads = engine.model_config.get_num_kv_heads(engine.parallel_config)
    for name, quota in rules.quotas.items():
        if quota.compresses:
            options = rules.config.of_policy(name).policy_options()
            policy = make_policy(name, options, quota.page_tokens)
            policy.layer_budgets(quota.num_layers, num_heads, quota.budget_tokens)


def check_batch(engine: EngineConfig, quota: Quota) -> None:
    """Raise unless a step has room for a whole chunk beside a token of every other request.

    Raises:
        ValueError: names both options and what they may be.
    """
    scheduler = engine.scheduler_config
    num_others, (batch_tokens, flag) = scheduler.max_num_seqs - 1, step_tokens(engine)
    least_tokens = least_batch_tokens(quota.chunk_tokens, scheduler.max_num_seqs)
    if batch_tokens < least_tokens:
        raise ValueError(
            f"{flag} {batch_tokens} has no room for a chunk of "
            f"{quota.chunk_tokens} tokens beside the {num_others} other requests that "
            f"--max-num-seqs {scheduler.max_num_seqs} allows: remove it or set it to at least "
            f"{least_tokens}, or lower --max-num-seqs or --kv-chunk-tokens (now together at most "
            f"{batch_tokens + 1})"
        )
