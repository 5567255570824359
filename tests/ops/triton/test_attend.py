"""`attend` in Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.factories import SOFTMAXES, batch_rows, make_cache, strided_randn
from tests.ops.test_attend import (
    DTYPES,
    PICTURES,
    check_kernel,
    check_pictures,
    check_quantised,
)
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.attend import attend
from vllm_budgetkv.ops.triton import attend_decode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    cache = make_cache([[70, 133], [19, 5]], PageLayout(16, head_size, dtype))
    check_kernel(cache, group=4, slots=[0, 1], tokens=[34, 1])


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_groups(group: int) -> None:
    cache = make_cache([[70, 33], [601, 1], [0, 88]], PageLayout(8, 64, torch.bfloat16))
    check_kernel(cache, group, slots=[1, 0, 2], tokens=[1, 13, 1])


@pytest.mark.parametrize(("chunk", "page_tokens"), [(1, 64), (65, 8), (129, 32)])
def test_chunks(chunk: int, page_tokens: int) -> None:
    """Ragged heads: one just holds the chunk, one is empty, others hold more."""
    cache = make_cache([[chunk, 0, chunk + 1, chunk + 300]], PageLayout(page_tokens, 32, DTYPES[0]))
    check_kernel(cache, group=2, slots=[0], tokens=[chunk])


@pytest.mark.parametrize("tokens", [[1, 20, 1, 0, 5], [1, 1, 1, 0, 1], [1, 2, 1, 0, 0]], ids=str)
def test_mixed_batch(tokens: list[int]) -> None:
    """Prefill, decode and padding at once; decode alone; a chunk hidden behind padding."""
    lens = [[2050, 3], [40, 1100], [90, 64], [512, 513], [0, 0]]
    cache = make_cache(lens, PageLayout(32, 64, torch.bfloat16))
    check_kernel(cache, group=4, slots=[3, 2, 0, 4, 1], tokens=tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 72, 256])
def test_quantised_pages(head_size: int, dtype: torch.dtype) -> None:
    check_quantised(PageLayout(16, head_size, dtype, is_quantised=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, dtype: torch.dtype) -> None:
    check_pictures(name, dtype)


def test_long_runs() -> None:
    """A table so wide that a run is longer than the shortest one."""
    cache = make_cache([[900, 513]], PageLayout(16, 32, torch.bfloat16), table_pages=1024)
    check_kernel(cache, group=2, slots=[0], tokens=[1])


@pytest.mark.parametrize("others", [0, 3])
def test_more_runs_than_are_joined_at_once(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """Of a decode alone and beside a chunk; one of two heads is done within the first of them."""
    monkeypatch.setattr(attend_decode, "MIN_RUN_TOKENS", 64)
    monkeypatch.setattr(attend_decode, "LONG_RUN_TOKENS", 64)
    cache = make_cache([[2200, 90], [30, 9]], PageLayout(16, 32, torch.bfloat16), table_pages=256)
    run = attend_decode.run_tokens(256, cache.pool.layout)
    assert run * attend_decode.MAX_BLOCK_RUNS < 2200 and run * attend_decode.MAX_RUNS == 4096
    check_kernel(cache, group=2, slots=[0, 1], tokens=[1, others])


def test_only_wide_tables_are_cut_in_more_runs() -> None:
    layout = PageLayout(32, 128, torch.bfloat16)
    found = [attend_decode.run_tokens(tokens // 32, layout) for tokens in (8192, 32768, 32800)]
    assert found == [256, 1024, 1024]
    assert attend_decode.run_tokens(131072 // 32, layout) == 131072 // attend_decode.MAX_RUNS


@pytest.mark.parametrize("chunk", [1, 40])
def test_large_scores(chunk: int) -> None:
    cache = make_cache([[700, 90]], PageLayout(16, 64, torch.float32))
    check_kernel(cache, group=2, slots=[0], tokens=[chunk], query_scale=200.0)


@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("query_scale", [0.1, 200.0])
def test_softmax(kind: str, query_scale: float) -> None:
    """Chunks and decodes, of one run of keys and of several; a head without a token."""
    cache = make_cache([[70, 520], [600, 0], [8, 33]], PageLayout(16, 32, torch.float32))
    for tokens in ([9, 1, 20], [1, 1, 1]):
        check_kernel(cache, 3, [0, 1, 2], tokens, query_scale, kind)
    short = make_cache([[70, 33]], PageLayout(16, 32, torch.float32))
    check_kernel(short, 3, [0], [1], query_scale, kind)


@pytest.mark.parametrize("chunk", [1, 3])
def test_nothing_behind_the_last_token_is_read(chunk: int) -> None:
    """Also not page 0, where masked addresses lead; it is free here, so it is poisoned."""
    layout = PageLayout(16, 32, torch.float32)
    caches = (make_cache([[70, 5]], layout, seed=seed) for seed in range(100))
    cache = next(cache for cache in caches if not (cache.table == 0).any())
    check_kernel(cache, group=2, slots=[0], tokens=[chunk])


def test_query_that_sees_nothing_gets_zeros() -> None:
    cache = make_cache([[2, 0], [0, 3]], PageLayout(8, 32, torch.float32), table_pages=64)
    query = strided_randn((6, 4, 32), torch.float32, seed=1)
    out = torch.full(query.shape, torch.nan)
    attend(query, cache.heads, batch_rows([0, 1], [5, 1]), out, 1.0)
    assert (out[:3, :2] == 0).all()
    assert (out[3:5, :2] != 0).all()
    assert (out[:5, 2:] == 0).all()
    assert (out[5, :2] == 0).all()
    assert (out[5, 2:] != 0).all()


@pytest.mark.parametrize("chunk", [1, 9])
def test_result_is_independent_of_the_batch(chunk: int) -> None:
    cache = make_cache([[1300, 300], [200, 90]], PageLayout(16, 64, torch.float32))
    query = strided_randn((chunk + 5, 4, 64), torch.float32, seed=1)
    alone, together = torch.empty_like(query), torch.empty_like(query)
    attend(query, cache.heads, batch_rows([0, 1], [chunk, 5]), together, 0.125)
    attend(query[:chunk], cache.heads, batch_rows([0], [chunk]), alone[:chunk], 0.125)
    assert torch.equal(alone[:chunk], together[:chunk])
