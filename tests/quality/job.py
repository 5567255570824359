"""Runs the lab's engines in a process of their own: `python -m tests.quality.job MODEL OUT`.

One oracle run, and what the engines' own banks, tables and pools say that the recorders must find.
OUT is a file of `torch.save`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality import oracle
from benchmarks.quality.heads import traced
from benchmarks.quality.inside import (
    KeptRecorder,
    PrefillRecorder,
    cache_of,
    in_order,
    prepare_environment,
)
from benchmarks.quality.lab import Lab, Outcome, Setup
from benchmarks.quality.metrics import QUERY_TOKENS
from benchmarks.quality.suite import Example, make_examples
from vllm_budgetkv.cache.probe.bank import ProbeBank
from vllm_budgetkv.cache.probe.probes import Probes
from vllm_budgetkv.policy.probe_source import PromptText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.cache.cache import BudgetCache
    from vllm_budgetkv.cache.requests import RequestState

PAGE_TOKENS = 8
PROBE_TOKENS = 16
QUOTA_PAGES = 20
ENGINE = {"max_num_batched_tokens": 64, "max_num_seqs": 1}


def setup(model: str) -> Setup:
    return Setup(
        model=model,
        budget={
            "policy": "hybrid",
            "page_quota": QUOTA_PAGES,
            "chunk_tokens": 48,
            "decode_interval_tokens": 16,
            "probe_tokens": PROBE_TOKENS,
            "window_tokens": 8,
        },
        page_tokens=PAGE_TOKENS,
        max_model_len=1024,
        engine=ENGINE,
    )


class End:
    """What a request holds when its prefill ends, read from tables and pool without recorders."""

    def __init__(self, lab: Lab) -> None:
        client = lab.llm.llm_engine.engine_core.engine_core
        model = client.model_executor.driver_worker.worker.model_runner.get_model()
        self._cache = cache_of(lab)
        self.found: dict[str, dict[str, Any]] = {}
        layers = [m for m in model.modules() if hasattr(m, "kv_cache") and hasattr(m, "impl")]
        self._outputs: list[torch.Tensor] = []
        for layer in layers:
            layer.register_forward_hook(lambda *args: self._outputs.append(args[2].clone()))
        model.register_forward_hook(self._see)

    def _see(self, *_: Any) -> None:
        step, outputs = self._cache.step, self._outputs.copy()
        self._outputs.clear()
        for plan in step.plans if step else ():
            request, tables = plan.request, self._cache.tables
            if not plan.ends_prefill or request.parent_id is not None:
                continue
            pages = tables.page_table[request.slot].long()
            self.found[request.request_id] = {
                "bank": vars(request.bank.copy()),
                "lens": tables.lens[request.slot].clone(),
                "keys": tables.pool.keys[pages].flatten(2, 3),
                "values": tables.pool.values[pages].flatten(2, 3),
                "is_static": tables.is_static[request.slot].clone(),
                "outputs": torch.stack([out[-QUERY_TOKENS:] for out in outputs]),
                "scales": self._cache.layers.reader.scales,
            }


class PrefillBanks(Probes):
    """Banks of every prompt, also where no policy asks."""

    def plan(self, request: RequestState, start: int, stop: int) -> Sequence[int]:
        if not request.in_prefill(start):
            return []
        if request.bank is None:
            request.ask_with(self.new_bank(request.policy))
        return PromptText.positions(request.spans, start, stop, self.options, is_seeded=False)


def keep_banks(cache: BudgetCache) -> None:
    """Let a cache whose policy asks nothing keep queries all the same."""
    arguments = {f.name: getattr(cache.layers.probes, f.name) for f in fields(Probes) if f.init}
    cache.layers = replace(cache.layers, probes=PrefillBanks(**arguments))


class WatchedLab(Lab):
    """A lab that notes everything that the recorders and tables say of its run."""

    runs: list[dict[str, Any]]

    def ask(self, examples: Sequence[Example]) -> list[Outcome]:
        compresses = self.setup.budget["policy"] == "hybrid"
        end = End(self)
        if not compresses:
            # the engine's own banks, which a full cache does not need, say what the seeds must be
            keep_banks(cache_of(self))
        with (
            PrefillRecorder(
                self,
                lambda spans: list(range(spans.prompt_tokens - QUERY_TOKENS, spans.prompt_tokens)),
                takes_cache=True,
            ) as prefill,
            KeptRecorder(self) as kept,
            traced(self) as traces,
        ):
            outcomes = super().ask(examples)
        self.runs.append(
            {
                "prefills": [vars(found) for found in prefill.prefills()],
                "kept": kept.kept(),
                "traces": [asdict(p.trace()) for p in in_order(traces)] if compresses else [],
                "end": in_order(end.found),
                "prompt_tokens": [outcome.prompt_tokens for outcome in outcomes],
            }
        )
        return outcomes


def watch_probes() -> list[dict[str, Any]]:
    """What is in a bank whenever its first layer is asked for a probe."""
    probes: list[dict[str, Any]] = []
    probe = ProbeBank.probe

    def watched(self: ProbeBank, layer: int, *args: Any) -> torch.Tensor:
        if layer == 0:
            probes.append({name: getattr(self.copy(), name) for name in ("queries", "positions")})
        return probe(self, layer, *args)

    ProbeBank.probe = watched
    return probes


def main() -> None:
    model, out = sys.argv[1:]
    prepare_environment()
    WatchedLab.runs = []
    oracle.Lab = WatchedLab
    examples = make_examples("needle", 256, 2)
    probes = watch_probes()
    outcomes = oracle.ask_with_oracle(setup(model), examples)
    full, compressed = WatchedLab.runs
    torch.save(
        {
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "full": full,
            "compressed": compressed,
            "probes": probes,
        },
        Path(out),
    )


if __name__ == "__main__":
    main()
