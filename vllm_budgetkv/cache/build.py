"""Put a cache together over a pool: the engine's and that of the test laboratory alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv import ops
from vllm_budgetkv.cache.cache import BudgetCache
from vllm_budgetkv.cache.compressor import Compressor
from vllm_budgetkv.cache.probe.bank import BankShape
from vllm_budgetkv.cache.probe.probes import Probes, asks_probe
from vllm_budgetkv.cache.reading import Reader, page_choice
from vllm_budgetkv.cache.recaller import Recaller
from vllm_budgetkv.cache.replay import Replay
from vllm_budgetkv.cache.report import Reports
from vllm_budgetkv.cache.rows import Rows
from vllm_budgetkv.cache.slots import Slots
from vllm_budgetkv.cache.step import Layers
from vllm_budgetkv.cache.streaming import Streaming
from vllm_budgetkv.cache.tables import HeadTables
from vllm_budgetkv.cache.tier import HostTier
from vllm_budgetkv.cache.trace import Traces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from vllm.v1.core.sched.output import NewRequestData

    from vllm_budgetkv.arithmetic.layout import BlockLayout, PagePool
    from vllm_budgetkv.cache.probe.bank import Rotary
    from vllm_budgetkv.cache.report import RequestRecord
    from vllm_budgetkv.cache.rules import Arrival, Rules


@dataclass(frozen=True)
class Model:
    """What a cache must know of a model and of the pool that was made for it.

    Args:
        pool: the head-pages of all layers.
        blocks: which of them a block of the engine is.
        layer_index: index in a block of each layer, by the engine's name.
        scales: of the logits, by the index of the layer.
        rotaries: rotary embedding by the index of the layer; a layer without one is left out.
        num_query_heads: query heads of this rank (Hq).
        group: which of the engine's lists of blocks of a request is that of these layers; it keeps
            another for every group of layers of another kind.
        soft_caps: of the logits, by the index of a layer that has one.
        sinks: learned, [Hq], by the index of a layer that has some.
        units: what a stored key and a stored value of 1 stand for, by the index of a layer whose
            keys and values are quantised.
    """

    pool: PagePool
    blocks: BlockLayout
    layer_index: Mapping[str, int]
    scales: Mapping[int, float]
    rotaries: Mapping[int, Rotary]
    num_query_heads: int
    group: int = 0
    soft_caps: Mapping[int, float] = field(default_factory=dict)
    sinks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    units: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.blocks.num_layers

    @property
    def num_heads(self) -> int:
        """KV heads of this rank (H)."""
        return self.blocks.num_heads

    @property
    def logit_scales(self) -> dict[int, float]:
        """Of products with keys as they are stored, by the index of the layer."""
        return {layer: scale * self.units_of(layer)[0] for layer, scale in self.scales.items()}

    def units_of(self, layer: int) -> tuple[float, float]:
        """What a stored key and a stored value of 1 stand for."""
        return self.units.get(layer, (1.0, 1.0))


def build_cache(
    model: Model,
    rules: Rules,
    arrival_of: Callable[[NewRequestData], Arrival],
    on_finished: Callable[[RequestRecord], None] | None,
    trace_file: Path | None = None,
) -> BudgetCache:
    """Build the cache of one worker.

    Args:
        model: what it is for.
        rules: what its requests may hold.
        arrival_of: what is known of a new request beside its prompt.
        on_finished: gets the record of every client request; None if nobody reads them.
        trace_file: gets a line with the story of every client request; None for none.

    Raises:
        ValueError: the policy does not fit the model.
    """
    tables, probes = _tables_of(model, rules), _probes_of(model, rules)
    softmaxes = _softmaxes(model)
    compressor = _compressor_of(model, rules, tables, probes, softmaxes)
    recaller = _recaller_of(model, rules, tables)
    reports = Reports(
        block_bytes=model.blocks.stride_pages * model.pool.layout.page_bytes,
        tables=tables,
        on_finished=on_finished,
        recaller=recaller,
        summarizes=rules.summarizes,
        traces=None if trace_file is None else Traces(trace_file, tables),
    )
    if rules.check_ledger:
        model.pool.poison()
    layers = Layers(
        index=model.layer_index,
        tables=tables,
        reader=Reader.empty(tables, softmaxes, _page_choice_of(rules), rules.num_slots),
        probes=probes,
        compressor=compressor,
        recaller=recaller,
        replay=_replay_of(rules, compressor, recaller),
        streaming=_streaming_of(model, rules, recaller),
        units=model.units,
    )
    return BudgetCache(
        slots=Slots(tables, rules, probes, reports, arrival_of, recaller, model.group),
        layers=layers,
        rows=Rows.empty(rules.num_slots, tables.lens.device),
        reports=reports,
        check_ledger=rules.check_ledger,
    )


def _compressor_of(
    model: Model,
    rules: Rules,
    tables: HeadTables,
    probes: Probes,
    softmaxes: Mapping[int, float | ops.Softmax],
) -> Compressor:
    compressor = Compressor(
        tables=tables,
        options=rules.options,
        probes=probes,
        scales=softmaxes,
        units=model.units,
        notes_mass=rules.summarizes,
        poison=rules.check_ledger,
    )
    for offer in rules.offers:
        if offer.policy.compresses:
            # refuses a model that does not fit before any request
            compressor.new_layer_budgets(offer.policy, offer.terms.quota)
    return compressor


def _softmaxes(model: Model) -> dict[int, float | ops.Softmax]:
    """How logits become weights in each layer: by a scale, if that is all."""
    found: dict[int, float | ops.Softmax] = {**model.logit_scales}
    for layer in {*model.soft_caps, *model.sinks, *model.units}:
        sinks = model.sinks.get(layer)
        found[layer] = ops.Softmax(
            model.logit_scales[layer],
            model.soft_caps.get(layer, 0.0),
            None if sinks is None else sinks.float(),
            model.units_of(layer)[1],
        )
    return found


def _page_choice_of(rules: Rules) -> ops.PageChoice | None:
    """What decode reads of heads that read some pages only; the same under every policy."""
    found = (page_choice(offer.policy, rules.options, offer.terms.quota) for offer in rules.offers)
    return next((choice for choice in found if choice is not None), None)


def _tables_of(model: Model, rules: Rules) -> HeadTables:
    return HeadTables.empty(
        model.pool,
        num_slots=rules.num_slots,
        blocks=model.blocks,
        width_pages=rules.table_width_pages,
        quota_blocks=rules.shared_blocks,
    )


def _recaller_of(model: Model, rules: Rules, tables: HeadTables) -> Recaller | None:
    quota = rules.recalling
    if quota is None:
        return None
    assert quota.recall is not None
    tier = HostTier.empty(
        model.pool.layout,
        tables.lens,
        num_blocks=rules.host_blocks,
        longest_tokens=rules.max_model_tokens,
        poison=rules.check_ledger,
    )
    index_pages, slot_pages = quota.most_recall_pages(rules.max_model_tokens)
    sizes = {"index_pages": index_pages, "slot_pages": slot_pages}
    if model.soft_caps or model.sinks:
        raise ValueError(
            "host memory brings no tokens back in a model with a soft cap on logits or learned "
            "attention sinks: remove --kv-host-memory"
        )
    return Recaller.empty(tables, tier, quota.recall, model.logit_scales, **sizes)


def _replay_of(rules: Rules, compressor: Compressor, recaller: Recaller | None) -> Replay | None:
    if recaller is None:
        return None
    rows = Rows.empty(rules.num_slots, compressor.tables.lens.device)
    return Replay(compressor.tables, recaller.tier, compressor, rows)


def _streaming_of(model: Model, rules: Rules, recaller: Recaller | None) -> Streaming | None:
    if recaller is None:
        return None
    units = {layer: model.units_of(layer)[1] for layer in model.scales}
    return Streaming(recaller.tables, recaller, model.logit_scales, units, rules.check_ledger)


def _probes_of(model: Model, rules: Rules) -> Probes:
    layout = model.pool.layout
    return Probes(
        options=rules.options,
        shape=BankShape(
            num_layers=model.num_layers,
            num_query_heads=model.num_query_heads,
            head_size=layout.head_size,
            dtype=layout.dtype,
            device=model.pool.raw.device,
        ),
        rotaries=model.rotaries,
        num_rows=rules.num_slots,
        are_asked=any(asks_probe(offer.policy) for offer in rules.offers),
    )
