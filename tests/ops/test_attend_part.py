"""`attend_part`: the reference against dense attention, the kernels against the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import Cache, assert_within_budget, batch_rows, make_cache, strided_randn
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import attend_part, backend
from vllm_budgetkv.ops.reference.attend_part import attend_part as attend_part_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
# rows of `batch_rows` begin at positions 100, 200, ...
FIRST_TOKENS = (0, 60, 96, 110, 400)


def weight_eps(dtype: torch.dtype) -> float:
    """Rounding of the weights: tensor cores and AMX take them in the cache's precision."""
    is_narrow = backend.of(torch.empty(0)) == "triton" or torch.ops.budgetkv.get_isa() == "amx"
    return torch.finfo(dtype).eps if is_narrow else EPS


def check_kernel(
    cache: Cache,
    group: int,
    slots: Sequence[int],
    tokens: Sequence[int],
    first_token: int,
    query_scale: float = 1.0,
) -> None:
    """Run kernel and references on random queries and compare them."""
    layout = cache.pool.layout
    shape = (sum(tokens), cache.lens.shape[1] * group, layout.head_size)
    query = strided_randn(shape, layout.dtype, seed=1, scale=query_scale)
    rows, scale = batch_rows(slots, tokens), 1 / math.sqrt(layout.head_size)

    def results(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full(shape, torch.nan, dtype=dtype), torch.full(shape[:2], torch.nan).to(dtype)

    actual, low_precision, exact = (
        results(torch.float32),
        results(torch.float32),
        results(torch.float64),
    )
    attend_part(query, cache.heads, rows, first_token, *actual, scale)
    attend_part_reference(query, cache.heads, rows, first_token, *low_precision, scale)
    attend_part_reference(query, cache.heads, rows, first_token, *exact, scale, torch.float64)
    # as much as the weights are rounded, what they weigh may be: the values without their signs
    weighed = cache.clone()
    weighed.pool.values.abs_()
    bound = results(torch.float64)
    attend_part_reference(query, weighed.heads, rows, first_token, *bound, scale, torch.float64)
    largest = exact[0].abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    steps = weight_eps(layout.dtype) / EPS * float(bound[0].max() / largest)
    assert_within_budget(actual[0], low_precision[0], exact[0], rounding_steps=steps)
    sees = exact[1].isfinite()
    assert (actual[1][~sees] == -torch.inf).all()
    assert (actual[0][~sees] == 0).all()
    if sees.any():
        assert_within_budget(actual[1][sees], low_precision[1][sees], exact[1][sees])


@pytest.mark.parametrize("cuts", [[0, 45], [0, 16, 45], [0, 16, 32, 45]], ids=str)
def test_joined_parts_are_dense_attention(cuts: list[int]) -> None:
    """45 tokens of which 9 ask, in runs of whole pages."""
    layout, num_tokens, asking = PageLayout(16, 64, torch.float32), 45, 9
    query = strided_randn((asking, 4, 64), torch.float32, seed=1).double()
    whole = make_cache([[num_tokens, num_tokens]], layout)
    rows = batch_rows([0], [asking])._replace(
        first_position=torch.tensor([num_tokens - asking], dtype=torch.int32)
    )
    outs, weights = [], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = whole.clone()
        first = start // 16
        part.table[0, :, : part.table.shape[-1] - first] = whole.table[0, :, first:]
        part.lens[0] = stop - start
        out = torch.empty(query.shape, dtype=torch.float64)
        lse = torch.empty(query.shape[:2], dtype=torch.float64)
        attend_part_reference(query, part.heads, rows, start, out, lse, 0.125, torch.float64)
        outs.append(out)
        weights.append(lse)
    shares = torch.stack(weights).softmax(dim=0)
    joined = (torch.stack(outs) * shares[..., None]).sum(dim=0)

    heads = [whole.head(0, head) for head in range(2)]
    keys = torch.stack([key for key, _ in heads]).double().repeat_interleave(2, dim=0)
    values = torch.stack([value for _, value in heads]).double().repeat_interleave(2, dim=0)
    mask = torch.ones(asking, num_tokens, dtype=torch.bool).tril(num_tokens - asking)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys, values, attn_mask=mask, scale=0.125
    )
    torch.testing.assert_close(joined, dense.transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first_token", FIRST_TOKENS)
def test_runs(instruction_set: str, first_token: int, dtype: torch.dtype) -> None:
    """In front of a row, cut by it, and behind it, where nobody sees anything."""
    cache = make_cache([[70, 133], [19, 0], [48, 5]], PageLayout(16, 64, dtype))
    check_kernel(cache, 4, [1, 2, 0], [66, 1, 5], first_token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype) -> None:
    for head_size in (32, 72):
        layout = PageLayout(16, head_size, dtype, is_quantised=True)
        cache = make_cache([[70, 133], [19, 0], [48, 5]], layout)
        check_kernel(cache, 4, [1, 2, 0], [66, 1, 5], 60)


@pytest.mark.parametrize("head_size", [32, 40, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 16])
def test_shapes(instruction_set: str, group: int, head_size: int) -> None:
    cache = make_cache([[70, 33]], PageLayout(8, head_size, torch.bfloat16))
    check_kernel(cache, group, [0], [40], 64)


@pytest.mark.parametrize("chunk", [1, 9])
def test_many_splits(instruction_set: str, chunk: int) -> None:
    """The keys are cut and joined again inside of the kernel."""
    cache = make_cache([[9001, 4100]], PageLayout(64, 32, torch.float32))
    check_kernel(cache, 2, [0], [chunk], 0)
    rows_first = 100
    check_kernel(cache, 2, [0], [chunk], rows_first - 5000)


@pytest.mark.parametrize("chunk", [1, 40])
def test_large_scores(instruction_set: str, chunk: int) -> None:
    cache = make_cache([[700, 90]], PageLayout(16, 64, torch.float32))
    check_kernel(cache, 2, [0], [chunk], 20, query_scale=200.0)


def test_bad_arguments_are_refused() -> None:
    cache = make_cache([[40]], PageLayout(16, 32, torch.float32))
    query, rows = torch.zeros(2, 1, 32), batch_rows([0], [2])
    out, lse = torch.zeros(2, 1, 32), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"out is torch\.bfloat16"):
        attend_part(query, cache.heads, rows, 0, out.bfloat16(), lse, 1.0)
    with pytest.raises(ValueError, match="lse is"):
        attend_part(query, cache.heads, rows, 0, out, lse[:1], 1.0)
    cache.table[0, 0, 1] = -1
    with pytest.raises(IndexError, match="outside the pool"):
        attend_part(query, cache.heads, rows, 0, out, lse, 1.0)
