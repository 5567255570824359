"""What launching costs the host, and the proof that a decode step fits a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import recall, work
from benchmarks.kernels.attention import CHOICE
from benchmarks.kernels.caches import Cache, build_cache, equal_lens
from benchmarks.kernels.compression import append_call, make_layers
from benchmarks.kernels.rows import Bench, Row, measure_row
from benchmarks.kernels.shapes import QWEN25_VL_7B, RETRIEVAL_RATIO, ModelShape
from benchmarks.kernels.timing import capture, host_seconds
from benchmarks.kernels.verdicts import Verdict, same_bits
from vllm_budgetkv import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP_ROWS, STEP_TOKENS = 16, 3000
# append, two of retrieve, decode and join
STEP_LAUNCHES = 5
# no op makes more, torch's own between the kernels of `merge` included
OP_LAUNCHES = 25
PROOF_LAYERS, PROOF_ROWS, PROOF_TOKENS, PROOF_STEPS = 3, 4, 500, 40
HOST_ROWS, HOST_TOKENS = 4, 64


@dataclass(frozen=True)
class DecodeStep:
    """Append, retrieve and attend of every layer for a batch of one token per row."""

    layers: list[Callable[[], None]]
    caches: list[Cache]
    outs: list[torch.Tensor]

    def run(self) -> None:
        for layer in self.layers:
            layer()


def decode_step(bench: Bench, model: ModelShape, caches: list[Cache], seed: int) -> DecodeStep:
    """One layer per cache; equal seeds give equal inputs."""
    torch.manual_seed(seed)
    layers, outs = [], []
    for cache in caches:
        rows = len(cache.lens)
        query = bench.randn(rows, model.heads, model.head_size)
        out = torch.zeros_like(query)
        append = append_call(bench, model, cache, 1)
        layers.append(_decode_layer(bench, model, cache, query, out, append))
        outs.append(out)
    return DecodeStep(layers, caches, outs)


def _decode_layer(
    bench: Bench,
    model: ModelShape,
    cache: Cache,
    query: torch.Tensor,
    out: torch.Tensor,
    append: Callable[[], None],
) -> Callable[[], None]:
    rows, chosen = bench.rows(len(out)), cache.room_to_choose()
    dynamic = torch.ones_like(cache.lens, dtype=torch.bool)

    def run() -> None:
        append()
        ops.retrieve(query, cache.heads, rows, dynamic, CHOICE, chosen)
        ops.attend(query, chosen, rows, out, model.head_size**-0.5)

    return run


def prove_capture(bench: Bench) -> list[Verdict]:
    """A captured decode step, replayed, does what the same steps do without a graph.

    Between replays lengths grow past a page, which the graph was not told.
    """
    model = QWEN25_VL_7B
    lens = equal_lens(PROOF_ROWS, model.kv_heads, PROOF_TOKENS)
    growth = 2 * PROOF_STEPS
    first = [
        build_cache(lens, bench.layout(model), bench.device, growth_tokens=growth)
        for _ in range(PROOF_LAYERS)
    ]
    second = [cache.clone() for cache in first]
    # what a warm-up leaves is the start of both
    eager, replayed = (decode_step(bench, model, caches, seed=7) for caches in (first, second))
    eager.run()
    replayed.run()
    try:
        graph = capture(replayed.run)
    except RuntimeError as error:
        return [Verdict("graph", f"not captured: {error}", 1.0, 0.0)]
    for _ in range(PROOF_STEPS):
        eager.run()
        graph.replay()
    verdicts = []
    for layer in range(PROOF_LAYERS):
        name = f"layer {layer} after {PROOF_STEPS} replays"
        verdicts.append(same_bits("graph", name, replayed.outs[layer], eager.outs[layer]))
        for field in ("table", "lens", "num_free"):
            pair = (getattr(second[layer], field), getattr(first[layer], field))
            verdicts.append(same_bits("graph", f"{name}, {field}", *pair))
    return verdicts


def step(bench: Bench) -> Iterator[Row]:
    """The attention side of a whole decode step of a 7B, in one graph and launch by launch."""
    model = QWEN25_VL_7B
    lens = equal_lens(STEP_ROWS, model.kv_heads, STEP_TOKENS)
    num_layers = 4 if bench.quick else model.layers
    caches = [
        build_cache(lens, bench.layout(model), bench.device, growth_tokens=256)
        for _ in range(num_layers)
    ]
    saved = [cache.snapshot() for cache in caches]
    whole = decode_step(bench, model, caches, seed=8)

    def reset() -> None:
        for cache, before in zip(caches, saved, strict=True):
            cache.restore(before)

    head_tokens = STEP_ROWS * model.kv_heads * STEP_TOKENS
    read = work.attend(model, STEP_ROWS, RETRIEVAL_RATIO * head_tokens, bench.page_tokens)
    one = work.retrieve(model, head_tokens / bench.page_tokens) + read
    one += work.append(model, STEP_ROWS)
    case = f"{model.name}, {num_layers} layers, {STEP_ROWS} x {STEP_TOKENS:,} tokens"
    row = measure_row(bench, "decode step", case, whole.run, one * num_layers, reset)
    graph = capture(whole.run)
    figures = {
        "host_seconds_without_graph": host_seconds(whole.run, num_layers * STEP_LAUNCHES, reset),
        "host_seconds_with_graph": host_seconds(graph.replay, num_layers * STEP_LAUNCHES, reset),
        "layers": num_layers,
    }
    yield replace(row, figures=figures)


def host(bench: Bench) -> Iterator[Row]:
    """CPU time of one call of every op, its checks included, on sizes that the card passes fast."""
    model = QWEN25_VL_7B
    lens = equal_lens(HOST_ROWS, model.kv_heads, HOST_TOKENS)
    cache = build_cache(lens, bench.layout(model), bench.device, growth_tokens=256)
    saved, layers = cache.snapshot(), make_layers(bench, model, 1)
    query = bench.randn(HOST_ROWS, model.heads, model.head_size)
    out, rows, chosen = torch.empty_like(query), bench.rows(HOST_ROWS), cache.room_to_choose()
    dynamic = torch.ones_like(cache.lens, dtype=torch.bool)
    rows.shared.fill_(True)
    mass = layers.score(0).mass
    keep = layers.select(0, mass)
    one = layers.cache.heads_of(0)
    calls: dict[str, Callable[[], object]] = {
        "append": append_call(bench, model, cache, 1),
        "reserve": lambda: ops.reserve(cache.heads, cache.stack, rows),
        "attend": lambda: ops.attend(query, cache.heads, rows, out, 0.1),
        "retrieve": lambda: ops.retrieve(query, cache.heads, rows, dynamic, CHOICE, chosen),
        "score": lambda: layers.score(0),
        "contrast": lambda: layers.contrast(0),
        "select": lambda: layers.select(0, mass),
        "compact": lambda: layers.compact(0, keep),
        "digest": lambda: ops.digest(one),
        "merge": lambda: ops.merge(keep, one, keep, "value", HOST_TOKENS, 0.8),
    }
    calls |= recall.host_calls(bench, model, HOST_ROWS, HOST_TOKENS)
    for name, call in calls.items():
        seconds = host_seconds(call, OP_LAUNCHES, lambda: cache.restore(saved))
        yield Row("host", f"{name}, one call", seconds, captured=False)
