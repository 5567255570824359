"""Put a cache together over a pool: the engine's and that of the test laboratory alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.cache.cache import BudgetCache
from vllm_budgetkv.cache.compressor import Compressor
from vllm_budgetkv.cache.probe.bank import BankShape
from vllm_budgetkv.cache.probe.probes import Probes
from vllm_budgetkv.cache.reading import Reader, page_choice
from vllm_budgetkv.cache.recaller import Recaller
from vllm_budgetkv.cache.replay import Replay
from vllm_budgetkv.cache.report import Reports
from vllm_budgetkv.cache.rows import Rows
from vllm_budgetkv.cache.slots import Slots
from vllm_budgetkv.cache.step import Layers
from vllm_budgetkv.cache.tables import HeadTables
from vllm_budgetkv.cache.tier import HostTier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.v1.core.sched.output import NewRequestData

    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.probe.bank import Rotary
    from vllm_budgetkv.cache.report import RequestRecord
    from vllm_budgetkv.policy import Policy, PolicyOptions


@dataclass(frozen=True)
class Model:
    """What a cache must know of a model and of the pool that was made for it.

    Args:
        pool: the head-pages of all layers.
        layer_index: index in a block of each layer, by the engine's name.
        scales: of the logits, by the index of the layer.
        rotaries: rotary embedding by the index of the layer; a layer without one is left out.
        num_query_heads: query heads of this rank (Hq).
        num_heads: KV heads of this rank (H).
    """

    pool: PagePool
    layer_index: Mapping[str, int]
    scales: Mapping[int, float]
    rotaries: Mapping[int, Rotary]
    num_query_heads: int
    num_heads: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_index)


@dataclass(frozen=True)
class Rules:
    """What a cache holds its requests to.

    Args:
        policy: which tokens stay.
        options: knobs of the policy.
        quota: what a request may hold; the tables are as large as it needs.
        num_slots: requests that may hold a slot at once.
        check_ledger: check every table after every step and fill what is free with NaN.
        max_model_tokens: tokens of the longest request.
        host_blocks: of host memory that keeps what quotas drop; 0 for none.
    """

    policy: Policy
    options: PolicyOptions
    quota: Quota
    num_slots: int
    check_ledger: bool
    max_model_tokens: int = 0
    host_blocks: int = 0


def build_cache(
    model: Model,
    rules: Rules,
    parent_of: Callable[[NewRequestData], str | None],
    on_finished: Callable[[RequestRecord], None] | None,
) -> BudgetCache:
    """Build the cache of one worker.

    Args:
        model: what it is for.
        rules: what its requests may hold.
        parent_of: id of the request that a new one looks ahead for; None for a client's.
        on_finished: gets the record of every client request; None if nobody reads them.

    Raises:
        ValueError: the policy does not fit the model.
    """
    policy, quota, tables = rules.policy, rules.quota, _tables_of(model, rules)
    probes = _probes_of(model, rules)
    choice = page_choice(policy, rules.options, quota)
    compressor = Compressor(
        tables=tables,
        policy=policy,
        options=rules.options,
        probes=probes,
        scales=model.scales,
        makes_digests=choice is not None,
        poison=rules.check_ledger,
        notes_concentration=quota.recall is not None,
    )
    if policy.compresses:
        compressor.new_layer_budgets(quota)  # refuses a model that does not fit before any request
    recaller = _recaller_of(model, rules, tables)
    reports = Reports(
        policy_name=policy.name,
        block_bytes=model.num_layers * model.num_heads * model.pool.layout.page_bytes,
        tables=tables,
        on_finished=on_finished,
        recaller=recaller,
    )
    if rules.check_ledger:
        model.pool.poison()
    layers = Layers(
        index=model.layer_index,
        tables=tables,
        reader=Reader.empty(tables, model.scales, choice, rules.num_slots),
        probes=probes,
        compressor=compressor,
        recaller=recaller,
        replay=_replay_of(rules, compressor, recaller),
    )
    return BudgetCache(
        slots=Slots(tables, quota, probes, reports, parent_of, rules.check_ledger, recaller),
        layers=layers,
        rows=Rows.empty(rules.num_slots, tables.lens.device),
        reports=reports,
        check_ledger=rules.check_ledger,
    )


def _tables_of(model: Model, rules: Rules) -> HeadTables:
    quota = rules.quota
    return HeadTables.empty(
        model.pool,
        shape=(rules.num_slots, model.num_layers, model.num_heads),
        width_pages=quota.table_width_pages,
        quota_blocks=quota.blocks if rules.policy.compresses else 0,
    )


def _recaller_of(model: Model, rules: Rules, tables: HeadTables) -> Recaller | None:
    quota = rules.quota
    if quota.recall is None or not rules.host_blocks:
        return None
    tier = HostTier.empty(
        model.pool.layout,
        tables.lens,
        num_blocks=rules.host_blocks,
        longest_tokens=rules.max_model_tokens,
        poison=rules.check_ledger,
    )
    index_pages, slot_pages = quota.most_recall_pages(rules.max_model_tokens)
    sizes = {"index_pages": index_pages, "slot_pages": slot_pages}
    return Recaller.empty(tables, tier, quota.recall, model.scales, **sizes)


def _replay_of(rules: Rules, compressor: Compressor, recaller: Recaller | None) -> Replay | None:
    if recaller is None:
        return None
    rows = Rows.empty(rules.num_slots, compressor.tables.lens.device)
    return Replay(compressor.tables, recaller.tier, compressor, rows)


def _probes_of(model: Model, rules: Rules) -> Probes:
    layout, source = model.pool.layout, rules.policy.probe_source
    return Probes(
        policy=rules.policy,
        options=rules.options,
        shape=BankShape(
            num_layers=model.num_layers,
            num_query_heads=model.num_query_heads,
            head_size=layout.head_size,
            dtype=layout.dtype,
            device=model.pool.raw.device,
        ),
        # queries that never ran ahead are asked from where they stand
        rotaries=model.rotaries if source.runs_ahead else {},
        num_rows=rules.num_slots,
    )
