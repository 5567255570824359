"""Times the ops of a compression, `retrieve` and those of recall against references, on the CPU.

Each kernel is first checked against its reference; then they run in turns, and times are medians.
One request and layer, half of whose tokens survive. For recall, heads hold a fifth of the prompt
and bring back half as much, none of which stands in their pages already. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels.caches import equal_lens
from benchmarks.kernels.checks import Sizes
from benchmarks.kernels.recall_checks import check_recall
from benchmarks.kernels.remembered import EMPTY, Remembered, build_tier, remember
from benchmarks.kernels.verdicts import wrong_ops
from vllm_budgetkv.arithmetic.layout import PageLayout, PagePool
from vllm_budgetkv.ops import (
    BatchRows,
    FreeStack,
    PageChoice,
    PagedHeads,
    append,
    compact,
    contrast,
    digest,
    encode,
    mark,
    recall,
    retrieve,
    score,
    select,
    store,
)
from vllm_budgetkv.ops.reference.append import append as append_reference
from vllm_budgetkv.ops.reference.compact import compact as compact_reference
from vllm_budgetkv.ops.reference.contrast import contrast as contrast_reference
from vllm_budgetkv.ops.reference.digest import digest as digest_reference
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.reference.recall import recall as recall_reference
from vllm_budgetkv.ops.reference.retrieve import retrieve as retrieve_reference
from vllm_budgetkv.ops.reference.score import score as score_reference
from vllm_budgetkv.ops.reference.select import select as select_reference
from vllm_budgetkv.ops.reference.store import store as store_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

HEADS, GROUP, HEAD_SIZE, TOKENS, PROBE_ROWS, PAGE_TOKENS = 4, 4, 64, 3000, 32, 16
CHUNK_TOKENS = 1024
WIDTH = -(-TOKENS // PAGE_TOKENS)
OPS = {
    "append": (append, append_reference),
    "score": (score, score_reference),
    "score, largest": (score, score_reference),
    "contrast": (contrast, contrast_reference),
    "select": (select, select_reference),
    "compact": (compact, compact_reference),
    "digest": (digest, digest_reference),
    "retrieve": (retrieve, retrieve_reference),
}
RECALL_OPS = {
    "store": (store, store_reference),
    "encode": (encode, encode_reference),
    "mark": (mark, mark_reference),
    "recall": (recall, recall_reference),
}
HELD_TOKENS, RECALLED_PAGES = TOKENS // 5, TOKENS // (10 * PAGE_TOKENS)
CHECKED = Sizes(
    "small", HEADS, GROUP, HEAD_SIZE, PAGE_TOKENS, mean_tokens=90, chunk_tokens=70, probe_rows=1
)


def make_pool(dtype: torch.dtype) -> PagePool:
    """Random keys and values, with digests; pages in the order of the heads' tokens."""
    layout = PageLayout(PAGE_TOKENS, HEAD_SIZE, dtype)
    pool = PagePool(torch.zeros(HEADS * WIDTH, layout.page_bytes, dtype=torch.uint8), layout)
    generator = torch.Generator().manual_seed(0)
    pool.keys.copy_(torch.randn(pool.keys.shape, generator=generator))
    pool.values.copy_(torch.randn(pool.values.shape, generator=generator))
    positions = torch.arange(WIDTH * PAGE_TOKENS, dtype=torch.int32).view(WIDTH, PAGE_TOKENS)
    pool.positions.copy_(positions.repeat(HEADS, 1))
    digest_reference(*arguments("digest", pool))
    return pool


def arguments(op: str, pool: PagePool) -> tuple[object, ...]:
    """Fresh arguments of one op: `append` and `compact` mutate their tables and stack."""
    generator = torch.Generator().manual_seed(1)
    shape = PROBE_ROWS, HEADS * GROUP, HEAD_SIZE
    probe = torch.randn(shape, generator=generator).to(pool.layout.dtype)
    scores = torch.rand(HEADS, TOKENS, generator=generator)
    table = torch.arange(HEADS * WIDTH, dtype=torch.int32).view(HEADS, WIDTH)
    heads = PagedHeads(pool, table, torch.full((HEADS,), TOKENS, dtype=torch.int32))
    stack = FreeStack(torch.zeros(HEADS * WIDTH).int(), torch.zeros(1, dtype=torch.int32))
    match op:
        case "score" | "score, largest":
            takes_largest = op.endswith("largest")
            return probe, heads, HEAD_SIZE**-0.5, TOKENS // 10, 4, takes_largest, TOKENS
        case "contrast":
            return heads, TOKENS
        case "select":
            return scores, (scores * 9 % 3).to(torch.uint8), heads.lens, heads.lens // 2
        case "compact":
            return scores > 0.5, heads, stack, False
        case "digest":
            return (heads,)
    # the rest take all slots: there is one
    layer = PagedHeads(pool, table[None], heads.lens[None])
    if op == "append":
        return append_arguments(layer, stack)
    read = PagedHeads(pool, torch.empty_like(layer.table), torch.empty_like(layer.lens))
    dynamic = torch.ones(1, HEADS, dtype=torch.bool)
    return probe[:1], layer, one_row(1), dynamic, PageChoice(0.4, 1, 2), read


def one_row(num_tokens: int) -> BatchRows:
    """Of the request in slot 0, whose table names its pages."""
    zero = torch.zeros(1, dtype=torch.int32)
    return BatchRows(zero, torch.tensor([0, num_tokens]).int(), zero, torch.tensor([False]))


def append_arguments(layer: PagedHeads, stack: FreeStack) -> tuple[object, ...]:
    """A chunk into heads that hold the rest already."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, CHUNK_TOKENS, HEADS, HEAD_SIZE)
    key, value = torch.randn(shape, generator=generator).to(layer.pool.layout.dtype)
    stacks = FreeStack(stack.free_pages[None], stack.num_free)
    heads = layer._replace(lens=layer.lens - CHUNK_TOKENS)
    return key, value, heads, stacks, one_row(CHUNK_TOKENS)


def outcome(run: Callable[..., object], op: str, pool: PagePool) -> list[object]:
    """What the op returned or mutated."""
    copy = PagePool(pool.raw.clone(), pool.layout)
    inputs = arguments(op, copy)
    result = run(*inputs)
    tensors = result if isinstance(result, tuple) else (result, *inputs)
    fields = (copy.keys, copy.values, copy.digests, copy.positions)
    return [each for each in (*flat(tensors), *fields) if isinstance(each, torch.Tensor)]


def flat(values: Iterable[object]) -> Iterator[object]:
    """What is in views too."""
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else (value,)


def make_remembered(dtype: torch.dtype) -> Remembered:
    """A prompt of which every head holds a fifth, with its index."""
    torch.manual_seed(0)
    layout, device = PageLayout(PAGE_TOKENS, HEAD_SIZE, dtype), torch.device("cpu")
    tier = build_tier((TOKENS,), 2, HEADS, layout, device)[-1]
    held, recalling = equal_lens(1, HEADS, HELD_TOKENS), torch.ones(1, HEADS, dtype=torch.bool)
    made = remember(tier, (TOKENS,), held, recalling, RECALLED_PAGES, layout)
    encode_reference(*recall_arguments("encode", made))
    mark_reference(*recall_arguments("mark", made))
    return made


def recall_arguments(op: str, made: Remembered) -> tuple[object, ...]:
    """Arguments of one op; for `recall`, recall pages are emptied."""
    generator, dtype = torch.Generator().manual_seed(1), made.cache.pool.layout.dtype
    match op:
        case "store":
            shape = (2, CHUNK_TOKENS, HEADS, HEAD_SIZE)
            key, value = torch.randn(shape, generator=generator).to(dtype)
            return key, value, one_row(CHUNK_TOKENS), made.tier
        case "encode":
            return 0, made.tier, made.recalls, made.cache.pool, made.energy
        case "mark":
            return 0, made.cache.heads, made.recalls
    made.cache.pool.positions[made.all_recall_pages()] = EMPTY
    query = torch.randn(1, HEADS * GROUP, HEAD_SIZE, generator=generator).to(dtype)
    moved = torch.zeros_like(made.cache.lens)
    heads = (made.cache.heads, one_row(1), made.recalls, made.tier)
    return query, *heads, HEAD_SIZE**-0.5, moved


def call_ms(run: Callable[..., object], inputs: tuple[object, ...]) -> float:
    start = time.perf_counter()
    run(*inputs)
    return 1e3 * (time.perf_counter() - start)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, Any], Callable[[], Any]]]:
    """Name, kernel and reference of every op, which has been checked, and its inputs for a call."""
    for op, runs in OPS.items():
        pool = make_pool(dtype)
        torch.testing.assert_close(*(outcome(run, op, pool) for run in runs))
        yield op, runs, partial(arguments, op, pool)
    torch.manual_seed(0)
    if wrong := wrong_ops(list(check_recall(CHECKED, dtype, torch.device("cpu")))):
        sys.exit(f"not as their references: {', '.join(sorted(wrong))}")
    made = make_remembered(dtype)
    for op, runs in RECALL_OPS.items():
        yield op, runs, partial(recall_arguments, op, made)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    report: dict[str, dict[str, float]] = {}
    print(f"{'op':16}{'dtype':16}{'kernel ms':>10}{'reference ms':>14}{'ratio':>8}")
    for dtype in (torch.float32, torch.bfloat16):
        for op, runs, make in cases(dtype):
            samples = [[call_ms(run, make()) for run in runs] for _ in range(repeats)]
            kernel, reference = (statistics.median(side) for side in zip(*samples, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"{op:16}{name:16}{kernel:10.3f}{reference:14.3f}{reference / kernel:8.1f}")
            report[f"{op}/{name}"] = {"kernel_ms": kernel, "reference_ms": reference}
    print(json.dumps({"threads": torch.get_num_threads(), "results": report}))


if __name__ == "__main__":
    main()
