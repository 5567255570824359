"""`score`: the reference against a naive formula, the kernels against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import (
    SOFTMAXES,
    UNIT,
    Cache,
    assert_within_budget,
    make_cache,
    softmax_of,
    strided_randn,
)
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.score import score as score_reference
from vllm_budgetkv.ops.score import Scores, score
from vllm_budgetkv.ops.select import select

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_budgetkv.ops.views import Softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (0, 1, 15, 16, 17, 1000)


def naive_score(
    probe: torch.Tensor,
    cache: Cache,
    softmax: Softmax,
    top_k: int,
    num_sinks: int,
    takes_largest: bool,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula of the docstring in float64, one head, row and query head at a time."""
    num_heads, group = cache.lens.shape[1], probe.shape[1] // cache.lens.shape[1]
    mass = torch.zeros(num_heads, max_tokens, dtype=torch.float64)
    norms = torch.zeros(num_heads, max_tokens, dtype=torch.float64)
    positions = torch.full((num_heads, max_tokens), -1, dtype=torch.int32)
    topk_mass = torch.ones(probe.shape[1], dtype=torch.float64)
    for head in range(num_heads):
        keys, values = cache.head(0, head)
        count = len(keys)
        pages = cache.table[0, head, : -(-count // cache.pool.layout.page_tokens)].long()
        positions[head, :count] = cache.pool.positions[pages].flatten()[:count]
        norms[head, :count] = values.double().norm(dim=1) * softmax.value_unit
        rest = positions[head, :count] >= num_sinks
        for query_head in range(head * group, (head + 1) * group):
            shares, rows = [], []
            for row in probe[:, query_head].double():
                logits = (keys.double() @ row) * softmax.scale
                if softmax.soft_cap:
                    logits = softmax.soft_cap * torch.tanh(logits / softmax.soft_cap)
                weights = logits.softmax(0)
                sink = logits.new_zeros(0)
                if softmax.sinks is not None:
                    sink = softmax.sinks[query_head, None].double()
                rows.append(torch.cat((logits, sink)).softmax(0)[:count])
                ranked = weights[rest].sort(descending=True).values
                shares.append(ranked[:top_k].sum() / ranked.sum() if rest.any() else 1.0)
            topk_mass[query_head] = sum(shares) / len(shares)
            by_row = torch.stack(rows)
            of_rows = by_row.max(dim=0).values if takes_largest else by_row.mean(dim=0)
            mass[head, :count] += of_rows / group
    return mass, topk_mass, norms, positions


def largest_logit(probe: torch.Tensor, cache: Cache, scale: float) -> float:
    """Largest absolute value of any row, query head and token."""
    num_heads = cache.lens.shape[1]
    return max(
        (queries.double() @ cache.head(0, head)[0].double().T).abs().max().item() * scale
        for head, queries in enumerate(probe.transpose(0, 1).chunk(num_heads))
        if cache.lens[0, head] > 0
    )


def check_score(
    lens: Sequence[int],
    layout: PageLayout,
    takes_largest: bool,
    *,
    group: int = 2,
    num_rows: int = 5,
    top_k: int = 8,
    num_sinks: int = 4,
    kind: str = "plain",
) -> Scores:
    """Reference against the naive formula, the op against both; returns the op's result."""
    cache = make_cache([lens], layout)
    probe = strided_randn((num_rows, len(lens) * group, layout.head_size), layout.dtype, seed=1)
    unit = UNIT if layout.is_quantised else 1.0
    softmax = softmax_of(kind, layout.head_size, probe.shape[1], unit)
    numbers = (softmax, top_k, num_sinks, takes_largest, max(lens) + 7)
    actual = score(probe, cache.heads_of(0), *numbers)
    reference = score_reference(probe, cache.heads_of(0), *numbers)
    exact = naive_score(probe, cache, *numbers)
    for name, got, low_precision, true in zip(
        Scores._fields, actual, reference, exact, strict=True
    ):
        if name == "positions":
            assert torch.equal(got, true)
            assert torch.equal(low_precision, true)
        else:
            torch.testing.assert_close(low_precision.double(), true, rtol=1e-4, atol=1e-6)
            # a rounding step of a logit moves its weight by as many as the logit is large; the mean
            # over the rows averages that out
            steps = 1.0
            if name == "mass" and takes_largest:
                steps = max(1.0, largest_logit(probe, cache, softmax.scale))
            assert_within_budget(got, low_precision, true, rounding_steps=steps)
    return actual


def check_pointing_rows(score_with: Callable[..., Sequence[torch.Tensor]]) -> None:
    """Rows that see one token each: one of four is a quarter by the mean, all by the largest.

    The mean over the query heads stays: what one of two points at is a half.
    """
    cache = make_cache([[5]], PageLayout(16, 32, torch.float32))
    cache.pool.keys[cache.table[0, 0, 0].long(), :5] = torch.eye(5, 32)
    pointed = torch.tensor([[0, 4], [1, 4], [1, 4], [1, 2]])
    probe = torch.eye(32)[pointed]
    for takes_largest, expected in (
        (False, [1 / 8, 3 / 8, 1 / 8, 0.0, 3 / 8]),
        (True, [1 / 2, 1 / 2, 1 / 2, 0.0, 1 / 2]),
    ):
        mass, topk_mass, *_ = score_with(probe, cache.heads_of(0), 200.0, 1, 0, takes_largest, 5)
        torch.testing.assert_close(mass, torch.tensor([expected]))
        torch.testing.assert_close(topk_mass, torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 40, 64, 72, 128, 256])
def test_head_sizes(
    instruction_set: str, takes_largest: bool, head_size: int, dtype: torch.dtype
) -> None:
    check_score((131, 0, 17), PageLayout(16, head_size, dtype), takes_largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, takes_largest: bool, dtype: torch.dtype) -> None:
    for head_size, kind in ((32, "plain"), (72, "cap-and-sinks"), (256, "plain")):
        layout = PageLayout(16, head_size, dtype, is_quantised=True)
        check_score((131, 0, 17), layout, takes_largest, num_rows=3, kind=kind)


@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(instruction_set: str, takes_largest: bool, kind: str, dtype: torch.dtype) -> None:
    """Sinks take of the mass, and of the top k nothing; a cap bends both."""
    check_score((131, 0, 17), PageLayout(16, 64, dtype), takes_largest, group=5, kind=kind)


@pytest.mark.parametrize("page_tokens", [8, 16, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_ragged_heads(
    instruction_set: str, takes_largest: bool, page_tokens: int, group: int
) -> None:
    layout = PageLayout(page_tokens, 32, torch.float32)
    result = check_score(RAGGED, layout, takes_largest, group=group)
    assert torch.equal(result.mass[0], torch.zeros(1007))
    assert torch.equal(result.topk_mass[: 2 * group], torch.ones(2 * group))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 19, 64])
def test_probe_rows(instruction_set: str, takes_largest: bool, num_rows: int) -> None:
    layout = PageLayout(16, 64, torch.bfloat16)
    check_score((100, 65), layout, takes_largest, num_rows=num_rows)


@pytest.mark.parametrize("num_sinks", [0, 4, 70, 10**6])
@pytest.mark.parametrize("top_k", [1, 64, 199, 2000])
def test_top_k_and_sinks(
    instruction_set: str, takes_largest: bool, top_k: int, num_sinks: int
) -> None:
    layout = PageLayout(16, 64, torch.float32)
    numbers = {"top_k": top_k, "num_sinks": num_sinks}
    result = check_score((200, 129), layout, takes_largest, **numbers)
    if num_sinks == 10**6:
        assert torch.equal(result.topk_mass, torch.ones(4))


def test_equal_weights_tie(instruction_set: str, takes_largest: bool) -> None:
    """All weights tie at the boundary of the top k, which then cuts through them."""
    cache = make_cache([[100]], PageLayout(16, 32, torch.float32))
    cache.pool.keys[:] = 1.0
    probe = torch.ones(3, 2, 32)
    result = score(probe, cache.heads_of(0), 0.1, 30, 0, takes_largest, 100)
    torch.testing.assert_close(result.mass, torch.full((1, 100), 0.01))
    torch.testing.assert_close(result.topk_mass, torch.full((2,), 0.3))


def test_strong_sinks_do_not_hide_the_rest(instruction_set: str, takes_largest: bool) -> None:
    """The rest's weights underflow next to the sink's, their renormalised shares must not."""
    cache = make_cache([[90]], PageLayout(16, 32, torch.float32))
    cache.pool.keys[:] = 0.0
    cache.pool.positions[cache.table[0, 0, 0].long(), 0] = 0
    cache.pool.keys[cache.table[0, 0, 0].long(), 0] = 100.0
    probe = torch.ones(2, 1, 32)
    arguments = (probe, cache.heads_of(0), 1.0, 10, 1, takes_largest, 90)
    for result in (score(*arguments), Scores(*score_reference(*arguments))):
        assert result.mass[0, 0] == 1.0
        torch.testing.assert_close(result.topk_mass, torch.tensor([10 / 89]))


def test_one_row_that_points_is_enough_for_the_largest(instruction_set: str) -> None:
    for score_with in (score, score_reference):
        check_pointing_rows(score_with)


def test_result_is_independent_of_threads(takes_largest: bool) -> None:
    cache = make_cache([RAGGED], PageLayout(16, 64, torch.float32))
    probe = strided_randn((19, 3 * len(RAGGED), 64), torch.float32, seed=1)
    arguments = (probe, cache.heads_of(0), 0.125, 30, 4, takes_largest, 1000)
    num_threads = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(score(*arguments))
    torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_needle_survives(
    instruction_set: str, takes_largest: bool, dtype: torch.dtype
) -> None:
    cache = make_cache([[333, 80]], PageLayout(16, 64, dtype))
    probe = strided_randn((4, 4, 64), dtype, seed=5)
    for head, needle in ((0, 217), (1, 0)):
        page = cache.table[0, head, needle // 16].long()
        cache.pool.keys[page, needle % 16] = 4 * probe[:, 2 * head : 2 * head + 2].mean((0, 1))
    result = score(probe, cache.heads_of(0), 1.0, 64, 0, takes_largest, 333)
    assert result.mass.argmax(dim=1).tolist() == [217, 0]
    tiers = torch.zeros_like(result.mass, dtype=torch.uint8)
    keep = select(result.mass, tiers, cache.lens[0], torch.tensor([1, 1], dtype=torch.int32))
    assert keep.nonzero().tolist() == [[0, 217], [1, 0]]


def test_wrong_arguments_are_refused() -> None:
    cache = make_cache([[40, 40]], PageLayout(16, 32, torch.float32))
    heads, probe = cache.heads_of(0), torch.zeros(2, 4, 32)
    with pytest.raises(ValueError, match="multiple of the 2 KV heads"):
        score(probe[:, :3], heads, 1.0, 1, 0, False, 40)
    with pytest.raises(ValueError, match=r"probe is .* pass torch.float32 \[any, any, 32\]"):
        score(torch.zeros(2, 4, 64), heads, 1.0, 1, 0, False, 40)
    with pytest.raises(ValueError, match="max_tokens is 1000"):
        score(probe, heads, 1.0, 1, 0, False, 1000)
    with pytest.raises(ValueError, match="top_k is 0"):
        score(probe, heads, 1.0, 0, 0, False, 40)


def test_kernel_refuses_wild_tables() -> None:
    cache = make_cache([[40, 40]], PageLayout(16, 32, torch.float32))
    arguments = (torch.zeros(2, 4, 32), cache.heads_of(0), 1.0, 1, 0, False)
    with pytest.raises(ValueError, match="holds 40 tokens but max_tokens is 39"):
        score(*arguments, 39)
    cache.table[0, 1, 2] = cache.pool.num_pages
    with pytest.raises(IndexError, match="entry 2 of a head is page"):
        score(*arguments, 40)
