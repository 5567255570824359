"""`compact` in Triton: every byte as the reference writes it."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_compact as naive
from tests.ops.factories import Cache, make_cache
from tests.ops.test_compact import (
    DTYPES,
    check_compact,
    make_shared_cache,
    random_keep,
    run,
)
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import PagedHeads
from vllm_budgetkv.ops.compact import compact
from vllm_budgetkv.ops.reference.compact import compact as compact_reference
from vllm_budgetkv.ops.triton import compact as launcher

LENS = (0, 1, 15, 16, 17, 150)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head takes several tiles, and so do its freed pages and a poisoned page."""
    monkeypatch.setattr(launcher, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(launcher, "BLOCK_PAGES", 4)


@pytest.mark.parametrize(
    ("share", "poison"), [(0.0, True), (0.05, True), (0.6, False), (1.0, True)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_survivors(dtype: torch.dtype, share: float, poison: bool) -> None:
    cache = make_shared_cache(LENS, PageLayout(16, 40, dtype))
    check_compact(cache, random_keep(LENS, share), poison)


@pytest.mark.parametrize("head_size", [32, 80, 96, 256])
def test_head_sizes(head_size: int) -> None:
    """Keys of one to eight slices, the last of which may be short."""
    for dtype in DTYPES[:2]:
        cache = make_shared_cache((70, 33), PageLayout(8, head_size, dtype))
        check_compact(cache, random_keep((70, 33), 0.7), poison=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    naive.test_quantised_pages(dtype)


@pytest.mark.parametrize("page_tokens", [8, 32, 256])
def test_page_sizes_and_repetition(page_tokens: int) -> None:
    cache = make_shared_cache((300, 33), PageLayout(page_tokens, 32, torch.bfloat16))
    for seed in range(3):
        lens = cache.lens[0].tolist()
        check_compact(cache, random_keep(lens, 0.6, seed), poison=True)


@pytest.mark.parametrize("first", [1, 64, 127])
def test_all_but_one(first: int) -> None:
    """Every token behind the dropped one moves by one: sources and targets overlap most."""
    cache = make_shared_cache((200,), PageLayout(16, 32, torch.float32))
    keep = torch.ones(1, 200, dtype=torch.bool)
    keep[0, first] = False
    check_compact(cache, keep, poison=True)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_layers_in_one_call(num_layers: int) -> None:
    """The heads of all layers at once give what layer by layer does, in the stack too."""
    lens = [40, 70, 9] * num_layers
    cache = make_shared_cache(lens, PageLayout(8, 32, torch.bfloat16))
    keep, expected = random_keep(lens, 0.4), cache.clone()
    run(compact, cache, keep, True)
    for layer in range(num_layers):
        heads = slice(3 * layer, 3 * layer + 3)
        layer_heads = PagedHeads(expected.pool, expected.table[0, heads], expected.lens[0, heads])
        compact_reference(keep[heads], layer_heads, expected.stack_of(0), True)
    _assert_equal(cache, expected)


def test_rows_that_lie_apart() -> None:
    cache = make_cache([[40, 20]], PageLayout(8, 32, torch.float32), free_pages=2)
    cache.free_pages = torch.cat(
        (cache.free_pages[:, :2], torch.zeros(1, 20, dtype=torch.int32)), 1
    )
    wide = torch.rand(2, 90, generator=torch.Generator().manual_seed(0))
    expected = cache.clone()
    run(compact, cache, (wide > 0.5)[:, :40], False)
    run(compact_reference, expected, (wide > 0.5)[:, :40], False)
    _assert_equal(cache, expected)


def _assert_equal(cache: Cache, expected: Cache) -> None:
    assert torch.equal(cache.pool.raw, expected.pool.raw)
    for name in ("table", "lens", "free_pages", "num_free"):
        assert torch.equal(getattr(cache, name), getattr(expected, name)), name
