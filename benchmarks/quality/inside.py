"""Looks inside the engine of a lab: what its layers compute, and what its requests hold.

Everything is read through forward hooks of torch, so the engine runs the code that it always runs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from vllm.v1.core.sched.output import SchedulerOutput

    from benchmarks.quality.lab import Lab
    from vllm_budgetkv.cache.cache import BudgetCache
    from vllm_budgetkv.cache.probe.probes import Probes
    from vllm_budgetkv.cache.requests import RequestState, RowPlan
    from vllm_budgetkv.cache.spans import PromptSpans

T = TypeVar("T")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # the engine core must run in this process, or there is nothing to look into
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def prepare_environment() -> None:
    """Set what `Lab` needs before vLLM is imported; variables that are set already stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def closing(lab: Lab) -> Iterator[Lab]:
    """Shut the lab's engine down at the end, so that this process can start another."""
    try:
        yield lab
    finally:
        lab.llm.llm_engine.engine_core.shutdown()


def cache_of(lab: Lab) -> BudgetCache:
    """The cache of the lab's only worker.

    Raises:
        ValueError: the lab runs stock vLLM or its engine core is another process.
    """
    worker = _worker_of(lab)
    if not hasattr(worker, "budget_cache"):
        raise ValueError("the lab runs stock vLLM: give its Setup a `budget` with a policy")
    return worker.budget_cache


def _worker_of(lab: Lab) -> Any:
    client = lab.llm.llm_engine.engine_core
    if not hasattr(client, "engine_core"):
        raise ValueError("the engine core is another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
    return client.engine_core.model_executor.driver_worker.worker


@contextmanager
def before_admission(lab: Lab, see: Callable[[Probes, SchedulerOutput], None]) -> Iterator[None]:
    """Show every step to `see` before the lab's worker follows it, when seeds are not taken yet."""
    cache = cache_of(lab)
    slots, probes = cache.slots, cache.layers.probes
    follow = slots.follow

    def see_and_follow(scheduled: SchedulerOutput) -> Any:
        see(probes, scheduled)
        return follow(scheduled)

    slots.follow = see_and_follow
    try:
        yield
    finally:
        del slots.follow


def client_number(request_id: str) -> int:
    """Number that `LLM.generate` gave a request, before the engine added its suffix."""
    return int(request_id.split("-")[0])


def in_order(by_id: Mapping[str, T]) -> list[T]:
    """What was found for each request, in the order in which the requests were asked."""
    return [by_id[request_id] for request_id in sorted(by_id, key=client_number)]


@dataclass
class Prefill:
    """What the layers computed for one prompt. L layers, H KV heads, Hq query heads, n tokens.

    Attributes:
        positions: the prompt positions whose queries are kept, m of them, ascending.
        rotary_positions: int64 [m], on the first axis of M-RoPE.
        queries: [L, m, Hq, D], rotated.
        keys: [L, H, n, D], rotated; values: the same. None unless they were asked for.
    """

    positions: list[int]
    rotary_positions: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor | None
    values: torch.Tensor | None


@dataclass
class _Pieces:
    """Parts of a `Prefill`, step by step and layer by layer."""

    positions: list[int] = field(default_factory=list)
    rotary: list[torch.Tensor] = field(default_factory=list)
    queries: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    values: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


class PrefillRecorder:
    """Records the queries, keys and values of every prompt that runs inside its `with`.

    Args:
        lab: its engine must run the plugin; nothing in it changes.
        choose: prompt positions whose queries are kept, from the spans of the prompt.
        takes_cache: keep the keys and values of all prompt tokens too.
    """

    def __init__(
        self, lab: Lab, choose: Callable[[PromptSpans], list[int]], *, takes_cache: bool = False
    ) -> None:
        self._cache, self._model = cache_of(lab), _worker_of(lab).model_runner.get_model()
        context = _worker_of(lab).vllm_config.compilation_config.static_forward_context
        self._layers = {
            index: context[name].register_forward_pre_hook
            for name, index in self._cache.layers.index.items()
        }
        self._choose, self._takes_cache = choose, takes_cache
        self._pieces: dict[str, _Pieces] = defaultdict(_Pieces)
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        handle = self._model.register_forward_pre_hook(self._see_positions, with_kwargs=True)
        self._hooks.callback(handle.remove)
        for index, register in self._layers.items():
            handle = register(
                lambda layer, args, index=index: self._see_layer(layer, index, *args[:3])
            )
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def prefills(self) -> list[Prefill]:
        """One for each client request that ran, in the order in which they were asked."""
        layers = range(len(self._layers))

        def per_layer(parts: dict[int, list[torch.Tensor]]) -> torch.Tensor:
            return torch.stack([torch.cat(parts[layer]) for layer in layers])

        return [
            Prefill(
                positions=pieces.positions,
                rotary_positions=torch.cat(pieces.rotary),
                queries=per_layer(pieces.queries),
                keys=per_layer(pieces.keys).transpose(1, 2) if self._takes_cache else None,
                values=per_layer(pieces.values).transpose(1, 2) if self._takes_cache else None,
            )
            for pieces in in_order(self._pieces)
        ]

    def _rows(self) -> Iterator[tuple[_Pieces, slice, list[int], list[int]]]:
        """Of each prompt in the step: its pieces, its tokens, chosen positions and their tokens."""
        step = self._cache.step
        if step is None:
            return
        for plan, start in zip(step.plans, step.starts, strict=False):
            request = plan.request
            if not _is_client_prefill(plan):
                continue
            # where nothing is compressed, a resumed request may run output with its prompt's end
            first = request.computed_tokens
            stop = min(plan.stop_tokens, request.spans.prompt_tokens)
            chosen = [p for p in self._choose(request.spans) if first <= p < stop]
            tokens = [p - first + start for p in chosen]
            yield (
                self._pieces[request.request_id],
                slice(start, start + stop - first),
                chosen,
                tokens,
            )

    def _see_positions(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs["positions"]
        axis = positions.view(-1, positions.shape[-1])[0]
        for plan in self._cache.step.plans if self._cache.step else ():
            if plan.request.computed_tokens == 0:
                # a preempted prompt starts again
                self._pieces.pop(plan.request.request_id, None)
        for pieces, _, chosen, tokens in self._rows():
            pieces.positions += chosen
            pieces.rotary.append(axis[tokens].clone())

    def _see_layer(
        self,
        layer: torch.nn.Module,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        query, key, value = (x.view(len(x), -1, layer.head_size) for x in (query, key, value))
        for pieces, rows, _, tokens in self._rows():
            pieces.queries[index].append(query[tokens].clone())
            if self._takes_cache:
                pieces.keys[index].append(key[rows].clone())
                pieces.values[index].append(value[rows].clone())


class KeptRecorder:
    """Records which prompt positions every head holds right behind the prefill of each prompt.

    Args:
        lab: its engine must run the plugin; nothing in it changes.
    """

    def __init__(self, lab: Lab) -> None:
        self._cache, self._model = cache_of(lab), _worker_of(lab).model_runner.get_model()
        self._kept: dict[str, torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        # behind the whole forward: by then every layer has compressed its last chunk
        handle = self._model.register_forward_hook(self._see_end)
        self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def kept(self) -> list[torch.Tensor]:
        """bool [L, H, n] of each client request, in the order in which they were asked."""
        return in_order(self._kept)

    def _see_end(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        step = self._cache.step
        for plan in step.plans if step else ():
            if plan.ends_prefill and _is_client_prefill(plan):
                self._kept[plan.request.request_id] = held_positions(self._cache, plan.request)


def held_positions(cache: BudgetCache, request: RequestState) -> torch.Tensor:
    """Prompt positions that every head of a request holds, bool [L, H, n]. Reads the device."""
    tables = cache.tables
    pool, lens = tables.pool, tables.lens[request.slot]
    held = torch.zeros(*lens.shape, request.spans.prompt_tokens, dtype=torch.bool)
    for layer, head in torch.cartesian_prod(*map(torch.arange, lens.shape)).tolist():
        num_tokens = int(lens[layer, head])
        num_pages = ceil_div(num_tokens, pool.layout.page_tokens)
        pages = tables.page_table[request.slot, layer, head, :num_pages].long()
        positions = pool.positions[pages].flatten()[:num_tokens].long().cpu()
        held[layer, head, positions] = True
    return held


def _is_client_prefill(plan: RowPlan) -> bool:
    """Whether a client's prompt runs in this row, and not a look-ahead or decode."""
    request = plan.request
    return request.parent_id is None and request.in_prefill(request.computed_tokens)
