"""The plan: what requests cost under a quota and without one, in the engine's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cli.costs import cost_under, slot_bytes, stock_cost
from vllm_budgetkv.cli.encoder import encoder_of
from vllm_budgetkv.cli.engine import plan_engine
from vllm_budgetkv.cli.memory import pool_of
from vllm_budgetkv.cli.quota_choice import choose_quota
from vllm_budgetkv.start import host_memory, pictures, pool_size, refusals, stages, stored
from vllm_budgetkv.start.groups import groups_of
from vllm_budgetkv.start.request_rules import RequestRules
from vllm_budgetkv.start.resolve import check_batch, check_policies, resolve_quota, resolve_quotas

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.recall import RecallRoom
    from vllm_budgetkv.cli.costs import RequestCost
    from vllm_budgetkv.cli.encoder import Encoder
    from vllm_budgetkv.cli.engine import PlannedEngine
    from vllm_budgetkv.cli.memory import Pool
    from vllm_budgetkv.cli.quota_choice import Choice
    from vllm_budgetkv.cli.wishes import Wishes
    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """What `--kv-host-memory` keeps on one worker.

    Args:
        num_bytes: of host memory.
        blocks: that it holds.
        request_bytes: of one request of the planned length.
        at_once: such requests that it holds together.
        room: what recall takes of a request's quota; None if it gets none.
    """

    num_bytes: int
    blocks: int
    request_bytes: int
    at_once: int
    room: RecallRoom | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `plan` tells.

    Args:
        wishes: what was asked for.
        engine: the configuration that was read.
        choice: the options with the quota.
        quota: the quota in numbers.
        tokens: of the longest request, prompt and answer.
        cost: of such a request under the quota.
        stock: the same for stock vLLM.
        slot_bytes: of page tables and probe bank of one request, beside the pool.
        pool: memory of the cache; None where nothing tells it.
        encoder: of a multimodal model.
        host: None without `--kv-host-memory`.
    """

    wishes: Wishes
    engine: PlannedEngine
    choice: Choice
    quota: Quota
    tokens: int
    cost: RequestCost
    stock: RequestCost
    slot_bytes: int
    pool: Pool | None
    encoder: Encoder | None
    host: HostPlan | None

    @property
    def kept_tokens(self) -> int:
        """Tokens per head, on average, that are left of the request once it was compressed."""
        if self.quota.fits(self.tokens):
            return self.tokens
        return self.quota.budget_tokens

    @property
    def keeps_pool(self) -> bool:
        """Whether the server must be told the pool, since it would leave the tower no memory."""
        has_tower = self.encoder is not None and bool(self.encoder.item_tokens)
        is_computed = self.pool is not None and bool(self.pool.shares)
        return has_tower and is_computed and self.engine.skips_tower


def _uncounted(engine: EngineConfig) -> str | None:
    """What of an engine is served but in no plan; None if all is counted."""
    groups = groups_of(engine)
    if groups.num_recurrent:
        return "recurrent state"
    if groups.num_windowed:
        return "windows"
    return f"the stages of {stages.FLAG}" if stages.is_staged(engine) else None


def make_plan(wishes: Wishes) -> Plan:
    """Read the model's configuration and count.

    Raises:
        ValueError: the server would refuse it, or something needed is missing; with what to change.
        OSError: there is no such model.
    """
    engine = plan_engine(wishes)
    tokens = wishes.tokens or engine.model_config.max_model_len
    refusals.refuse(refusals.of_model(engine), engine.policy)
    stored.settle(engine)
    if uncounted := _uncounted(engine):
        raise ValueError(
            f"no plan counts {uncounted} yet: start the server, whose first lines say what fits"
        )
    encoder = encoder_of(engine)
    pool = pool_of(engine, wishes, encoder)
    pool_bytes = None if pool is None else pool.num_bytes
    stock = stock_cost(engine, tokens, pool_bytes)
    choice = choose_quota(engine, wishes.concurrency, pool, stock)
    quota = resolve_quota(engine, choice.config)
    _check(engine, choice.config, quota, pool)
    return Plan(
        wishes=wishes,
        engine=engine,
        choice=choice,
        quota=quota,
        tokens=tokens,
        cost=cost_under(engine, quota, tokens, pool_bytes),
        stock=stock,
        slot_bytes=slot_bytes(engine, choice.config, quota),
        pool=pool,
        encoder=encoder,
        host=_host_plan(engine, choice.config, quota, tokens),
    )


def _check(engine: PlannedEngine, config: BudgetConfig, quota: Quota, pool: Pool | None) -> None:
    """Refuse what the server would refuse, in its words."""
    rules = RequestRules(config, resolve_quotas(engine, config))
    check_policies(engine, rules)
    host_memory.check_block(engine, config)
    if quota.compresses:
        options = None if pool is None else pool.options
        largest = rules.largest(config.policy)
        pool_size.check(engine, largest, None if pool is None else pool.num_bytes, options)
        check_batch(engine, quota)
    pictures.check(engine, quota)


def _host_plan(
    engine: PlannedEngine, config: BudgetConfig, quota: Quota, tokens: int
) -> HostPlan | None:
    if not config.host_bytes:
        return None
    blocks = host_memory.num_blocks(engine, config)
    request_blocks = ceil_div(tokens, quota.page_tokens)
    block_bytes = quota.page_tokens * host_memory.token_bytes(engine)
    return HostPlan(
        num_bytes=config.host_bytes,
        blocks=blocks,
        request_bytes=request_blocks * block_bytes,
        at_once=blocks // request_blocks,
        room=quota.recall_room(tokens),
    )
