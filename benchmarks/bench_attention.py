"""Attention kernels: `vllm_budgetkv.ops.attend` against vLLM's own for the CPU, on equal work.

    python benchmarks/bench_attention.py [--repeats 9] [--only prefill|decode|8-bit] [--one-thread]

Every case is checked against vLLM's result first. The two are then timed in turn, so that a change
of clock or load meets both. The ratio is vLLM's median time over ours: above 1 we are faster. The
last line of the output is JSON. `--one-thread` counts CPU time instead, for a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_budgetkv.arithmetic.layout import PageLayout, PagePool
from vllm_budgetkv.ops import BatchRows, PagedHeads, attend, quantise

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS = ((16, 4), (16, 8), (16, 2))
PREFILL_KEYS = (1024, 4096, 16384)
DECODE_KEYS = (3000, 30000)


@dataclass(frozen=True)
class Case:
    rows: int
    tokens: int
    keys: int
    heads: tuple[int, int]
    head_size: int
    page_tokens: int
    dtype: torch.dtype
    is_quantised: bool = False

    @property
    def name(self) -> str:
        kind = f"prefill {self.tokens}" if self.tokens > 1 else f"decode {self.rows} rows"
        dtype = str(self.dtype).removeprefix("torch.")
        heads = "/".join(map(str, self.heads))
        return (
            f"{kind} x {self.keys} keys, heads {heads} x {self.head_size}, "
            f"page {self.page_tokens}, {dtype}{', 8-bit keys and values' * self.is_quantised}"
        )

    @property
    def cache_dtype(self) -> str:
        """As vLLM's ops name it."""
        return "fp8" if self.is_quantised else "auto"


def all_cases() -> list[Case]:
    """The grid thinned out: heads and pages vary on the middle sizes only."""
    cases = []
    for dtype, size in itertools.product((torch.float32, torch.bfloat16), (64, 128)):
        for keys in PREFILL_KEYS:
            cases.append(Case(1, 1024, keys, (16, 4), size, 32, dtype))
        for rows, keys in itertools.product((1, 4, 8), DECODE_KEYS):
            cases.append(Case(rows, 1, keys, (16, 4), size, 32, dtype))
        for heads, page_tokens in (((16, 8), 32), ((16, 2), 32), ((16, 4), 16)):
            cases.append(Case(1, 1024, 4096, heads, size, page_tokens, dtype))
            cases.append(Case(4, 1, 3000, heads, size, page_tokens, dtype))
        for keys in PREFILL_KEYS[:2]:
            cases.append(Case(1, 1024, keys, (16, 4), size, 32, dtype, True))
        for rows, keys in ((1, 30000), (4, 3000), (4, 30000)):
            cases.append(Case(rows, 1, keys, (16, 4), size, 32, dtype, True))
    return cases


def build(case: Case) -> tuple[Callable[[], None], Callable[[], None], torch.Tensor, torch.Tensor]:
    """Both kernels over the same tokens: `(ours, vllms, our_out, vllm_out)`."""
    (q_heads, kv_heads), size, rows = case.heads, case.head_size, case.rows
    width = -(-case.keys // case.page_tokens)
    scale = size**-0.5
    query = torch.randn(rows * case.tokens, q_heads, size, dtype=case.dtype)
    ours, vllms = torch.empty_like(query), torch.empty_like(query)
    starts = torch.arange(rows + 1, dtype=torch.int32) * case.tokens
    lens = torch.full((rows,), case.keys, dtype=torch.int32)
    blocks = torch.randperm(rows * width, dtype=torch.int32).view(rows, width)

    shape = (rows * width, kv_heads, 2 * case.page_tokens, size)
    stored = torch.uint8 if case.is_quantised else case.dtype
    key_cache, value_cache = torch.empty(shape, dtype=stored).chunk(2, dim=2)
    layout = PageLayout(case.page_tokens, size, case.dtype, case.is_quantised)
    num_pages = rows * width * kv_heads
    pool = PagePool(torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8), layout)
    # what vLLM's own backend would take on this machine; it packs keys in an order of its own, so
    # its cache is filled by its own op
    isa = _get_attn_isa(case.dtype, case.page_tokens, size, case.cache_dtype)
    tokens = rows * width * case.page_tokens
    key = torch.randn(tokens, kv_heads, size, dtype=case.dtype)
    value = torch.randn(tokens, kv_heads, size, dtype=case.dtype)
    slots = torch.arange(tokens)
    handed = key, value
    if case.is_quantised:
        handed, (key, value) = on_a_grid(key, value)
    caches = (key_cache, value_cache)
    vllm_ops.cpu_attn_reshape_and_cache(
        *handed, *caches, slots, isa, kv_cache_dtype=case.cache_dtype
    )
    for field, new in ((pool.keys, key), (pool.values, value)):
        paged = new.view(rows * width, case.page_tokens, kv_heads, size).transpose(1, 2)
        field.copy_(paged.reshape(num_pages, case.page_tokens, size))
    head_ids = torch.arange(kv_heads, dtype=torch.int32)
    table = blocks[:, None, :] * kv_heads + head_ids[None, :, None]
    head_lens = lens[:, None].expand(rows, kv_heads).contiguous()
    heads = PagedHeads(pool, table, head_lens)
    row_slots, own_pages = torch.arange(rows, dtype=torch.int32), torch.zeros(rows).bool()
    batch = BatchRows(row_slots, starts, lens - case.tokens, own_pages)
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        *(rows, q_heads, kv_heads, size, lens, case.dtype, starts, True, -1, isa, True),
        kv_cache_dtype=case.cache_dtype,
    )

    def run_ours() -> None:
        attend(query, heads, batch, ours, scale)

    def run_vllm() -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query,
            key_cache,
            value_cache,
            vllms,
            starts,
            lens,
            scale,
            True,
            None,
            -1,
            blocks,
            0.0,
            plan,
            None,
            kv_cache_dtype=case.cache_dtype,
        )

    return run_ours, run_vllm, ours, vllms


def on_a_grid(key: torch.Tensor, value: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Keys and values of 8 bits, and before them such that vLLM's op stores the same.

    It cuts towards zero, so what it is handed lies a little above the number.
    """
    quantised = quantise(key, value, 1.0, 1.0)
    above = 1 + 2 * torch.finfo(key.dtype).eps
    return tuple((each.float() * above).to(key.dtype) for each in quantised), quantised


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of ours and of vLLM's."""
    *kernels, ours, vllms = build(case)
    for kernel in kernels:
        kernel()
    tolerance = 32 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(ours, vllms, rtol=tolerance, atol=tolerance)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for kernel, taken in zip(kernels, seconds, strict=True):
            start = clock()
            kernel()
            taken.append(clock() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=("prefill", "decode", "8-bit"), default="")
    parser.add_argument("--one-thread", action="store_true")
    options = parser.parse_args()
    clock = time.thread_time if options.one_thread else time.perf_counter
    if options.one_thread:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    # asks the system for the tiles of AMX, where vLLM's kernel would use them
    torch.cpu._init_amx()
    ratios = {}
    for case in all_cases():
        if options.only not in case.name:
            continue
        ours, vllms = measure(case, options.repeats, clock)
        ratios[case.name] = round(vllms / ours, 3)
        print(f"{ours * 1e3:9.2f} ms  {vllms * 1e3:9.2f} ms  {vllms / ours:6.2f}  {case.name}")
    print(json.dumps({"threads": torch.get_num_threads(), "vllm_seconds_over_ours": ratios}))


if __name__ == "__main__":
    main()
