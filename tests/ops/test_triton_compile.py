"""Every Triton kernel compiles for GPUs that are not there, and fits their shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import batch_rows, both_ways, int32, make_cache, softmax_of
from tests.ops.recall_factory import make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import PageChoice, Softmax

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError

from tests.ops import ahead_of_time

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_HEADS = 4
WIDTH_PAGES = 256
# shared memory that one program may take
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# of a thread; products of full float32 run outside of the tensor cores and take all registers
ALLOWED_SPILL_BYTES = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 512}
CASES = [
    (80, torch.bfloat16, 128, 4),
    (80, torch.float32, 64, 1),
    (90, torch.bfloat16, 128, 7),
    (90, torch.float16, 80, 16),
    (100, torch.bfloat16, 128, 4),
    (100, torch.bfloat16, 256, 8),
]
# of quantised pages, whose type GPUs before 89 do not have
QUANTISED_CASES = [
    (90, torch.bfloat16, 128, 7),
    (90, torch.float16, 80, 16),
    (90, torch.float32, 64, 1),
    (100, torch.bfloat16, 256, 8),
]


def launch_append(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.append import append

    cache = make_cache([[70] * NUM_HEADS, [40] * NUM_HEADS], layout)
    key = torch.zeros(50, NUM_HEADS, layout.head_size, dtype=layout.kv_dtype)
    append(key, key, cache.heads, cache.stack, batch_rows([0, 1], [20, 30], [True, False]))


def launch_quantise(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.quantise import quantise

    key = torch.zeros(50, NUM_HEADS, layout.head_size, dtype=layout.dtype)
    quantise(key, key, 0.7, 0.3)


def launch_reserve(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.reserve import reserve

    # the heads of all layers
    cache = make_cache([[70] * 28 * NUM_HEADS], layout, free_pages=200)
    reserve(cache.heads, cache.stack, batch_rows([0], [1]))


def launch_attend(layout: PageLayout, group: int) -> None:
    """Prefill with a decode row, of text and of a picture; and decode alone."""
    from vllm_budgetkv.ops.triton.attend import attend

    cache = make_cache([[70] * NUM_HEADS, [40] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    query = torch.zeros(20, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    for num_tokens, ahead in ((20, None), (20, both_ways(20, (3, 18))), (2, None)):
        queries, rows = query[:num_tokens], batch_rows([0, 1], [1, num_tokens - 1])
        attend(queries, cache.heads, rows, queries, Softmax(0.1), ahead)


def launch_score(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.score import score

    cache = make_cache([[70] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    probe = torch.zeros(32, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    for max_tokens in (4096, WIDTH_PAGES * layout.page_tokens):
        for takes_largest in (False, True):
            score(probe, cache.heads_of(0), Softmax(0.1), 64, 4, takes_largest, max_tokens)


def launch_softmax(layout: PageLayout, group: int) -> None:
    """`attend` and `score` with a soft cap and with sinks."""
    from vllm_budgetkv.ops.triton.attend import attend
    from vllm_budgetkv.ops.triton.score import score

    cache = make_cache([[70] * NUM_HEADS, [40] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    query = torch.zeros(20, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    softmax = softmax_of("cap-and-sinks", layout.head_size, query.shape[1])
    for num_tokens in (20, 2):
        queries, rows = query[:num_tokens], batch_rows([0, 1], [1, num_tokens - 1])
        attend(queries, cache.heads, rows, queries, softmax, None)
    score(query, cache.heads_of(0), softmax, 64, 4, False, 4096)


def launch_contrast(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.contrast import contrast

    cache = make_cache([[70] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    contrast(cache.heads_of(0), WIDTH_PAGES * layout.page_tokens)


def launch_retrieve(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.retrieve import retrieve

    cache = make_cache([[70] * NUM_HEADS] * 2, layout, table_pages=WIDTH_PAGES)
    query = torch.zeros(2, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    dynamic, rows = torch.ones(2, NUM_HEADS, dtype=torch.bool), batch_rows([0, 1], [1, 1])
    retrieve(query, cache.heads, rows, dynamic, PageChoice(0.4, 1, 2), cache.clone().heads)


def launch_select(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.select import select

    scores, counts = torch.zeros(NUM_HEADS, 3000), int32([70] * NUM_HEADS)
    select(scores, scores.to(torch.uint8), counts, counts)


def launch_compact(layout: PageLayout, group: int) -> None:
    """Without poisoning and with it."""
    from vllm_budgetkv.ops.triton.compact import compact

    cache = make_cache([[70] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    keep = torch.zeros(NUM_HEADS, 80, dtype=torch.bool)
    for poison in (False, True):
        compact(keep, cache.heads_of(0), cache.stack_of(0), poison)


def launch_digest(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.digest import digest

    cache = make_cache([[70] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    digest(cache.heads_of(0))


def launch_merge(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.merge import merge

    cache = make_cache([[70] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    keep = torch.zeros(NUM_HEADS, 80, dtype=torch.bool)
    for mode in ("value", "weighted"):
        merge(keep, cache.heads_of(0), keep, mode, 80, 0.8)


def launch_store(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.load import load
    from vllm_budgetkv.ops.triton.store import store

    made = make_remembered([70, 40], layout, num_heads=NUM_HEADS)
    key = torch.zeros(50, NUM_HEADS, layout.head_size, dtype=layout.kv_dtype)
    for move in (store, load):
        move(key, key, batch_rows([0, 1], [20, 30]), made.tier)


def launch_stage(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.stage import stage

    made = make_remembered([70, 40], layout, num_heads=NUM_HEADS)
    pages = made.cache.free_pages[0, : 2 * NUM_HEADS].view(NUM_HEADS, 2)
    stage(pages, made.cache.pool, 1, 0, made.tier)


def launch_attend_part(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.attend_part import attend_part

    cache = make_cache([[70] * NUM_HEADS, [40] * NUM_HEADS], layout, table_pages=WIDTH_PAGES)
    query = torch.zeros(20, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    attend_part(query, cache.heads, batch_rows([0, 1], [1, 19]), 32, out, lse, 0.1)


def launch_encode(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.encode import encode

    made = make_remembered([70, 40], layout, num_heads=NUM_HEADS)
    energy = torch.ones(NUM_HEADS, layout.head_size)
    encode(1, made.tier, made.recalls, made.cache.pool, energy)


def launch_mark(layout: PageLayout, group: int) -> None:
    from vllm_budgetkv.ops.triton.mark import mark

    made = make_remembered([70, 40], layout, num_heads=NUM_HEADS)
    mark(1, made.cache.heads, made.recalls)


def launch_recall(layout: PageLayout, group: int) -> None:
    """Of an index as wide as that of a long prompt, and of one page."""
    from vllm_budgetkv.ops.triton.recall import recall

    made = make_remembered([70, 40], layout, num_heads=NUM_HEADS)
    query = torch.zeros(2, NUM_HEADS * group, layout.head_size, dtype=layout.dtype)
    moved, rows = torch.zeros(2, NUM_HEADS, dtype=torch.int32), batch_rows([0, 1], [1, 1])
    for width_pages in (400, 1):
        table = torch.zeros(2, NUM_HEADS, width_pages, dtype=torch.int32)
        recalls = made.recalls._replace(table=table)
        recall(query, made.cache.heads, rows, recalls, made.tier, 0.1, moved)


# how many launches each of these makes
LAUNCHERS: dict[Callable[[PageLayout, int], None], int] = {
    launch_append: 1,
    launch_reserve: 1,
    launch_attend: 6,
    launch_score: 8,
    launch_softmax: 6,
    launch_contrast: 2,
    launch_retrieve: 2,
    launch_select: 1,
    launch_compact: 4,
    launch_digest: 1,
    launch_merge: 4,
    launch_store: 2,
    launch_stage: 1,
    launch_attend_part: 1,
    launch_encode: 1,
    launch_mark: 1,
    launch_recall: 12,
}


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
@pytest.mark.parametrize(("capability", "dtype", "head_size", "group"), CASES)
def test_compiles(
    capability: int,
    dtype: torch.dtype,
    head_size: int,
    group: int,
    launcher: Callable[[PageLayout, int], None],
) -> None:
    check_compiles(launcher, PageLayout(32, head_size, dtype), capability, group)


@pytest.mark.parametrize(
    "launcher", [*LAUNCHERS, launch_quantise], ids=lambda launcher: launcher.__name__
)
@pytest.mark.parametrize(("capability", "dtype", "head_size", "group"), QUANTISED_CASES)
def test_quantised_pages(
    capability: int,
    dtype: torch.dtype,
    head_size: int,
    group: int,
    launcher: Callable[[PageLayout, int], None],
) -> None:
    layout = PageLayout(32, head_size, dtype, is_quantised=True)
    check_compiles(launcher, layout, capability, group)


def check_compiles(
    launcher: Callable[[PageLayout, int], None], layout: PageLayout, capability: int, group: int
) -> None:
    """Every launch for GPUs of this capability, without more memory or registers than there are."""
    with ahead_of_time.record() as launches:
        launcher(layout, group)
    assert len(launches) == LAUNCHERS.get(launcher, 1)
    for launch in launches:
        name = launch.kernel.__name__
        usage = ahead_of_time.compile_for(launch, capability)
        assert usage.shared_bytes <= SHARED_BYTES[capability], (name, usage)
        assert usage.stack_bytes <= ALLOWED_SPILL_BYTES[layout.dtype], (name, usage)


def test_a_kernel_that_does_not_compile_is_found() -> None:
    with ahead_of_time.record() as launches:
        launch_append(PageLayout(32, 64, torch.float16), 1)
    launches[0].arguments["BLOCK_SIZE"] = 80
    with pytest.raises(CompilationError):
        ahead_of_time.compile_for(launches[0], 90)
