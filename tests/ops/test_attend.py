"""`attend`: the reference against dense attention, the kernels against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import (
    SOFTMAXES,
    UNIT,
    Cache,
    assert_within_budget,
    batch_rows,
    both_ways,
    make_cache,
    softmax_of,
    strided_randn,
)
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.attend import attend
from vllm_budgetkv.ops.reference.attend import attend as attend_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 40, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 4, 7, 8, 16)


def check_kernel(
    cache: Cache,
    group: int,
    slots: Sequence[int],
    tokens: Sequence[int],
    query_scale: float = 1.0,
    kind: str = "plain",
    ahead: torch.Tensor | None = None,
) -> None:
    """Run kernel and references on random queries and compare them."""
    layout = cache.pool.layout
    shape = (sum(tokens), cache.lens.shape[1] * group, layout.head_size)
    query = strided_randn(shape, layout.dtype, seed=1, scale=query_scale)
    rows = batch_rows(slots, tokens)
    unit = UNIT if layout.is_quantised else 1.0
    scale = softmax_of(kind, layout.head_size, shape[1], unit)
    actual = strided_randn(shape, layout.dtype, seed=2)
    around = actual._base
    attend(query, cache.heads, rows, actual, scale, ahead)
    low_precision = torch.full(shape, torch.nan, dtype=layout.dtype)
    attend_reference(query, cache.heads, rows, low_precision, scale, ahead=ahead)
    exact = torch.full(shape, torch.nan, dtype=torch.float64)
    attend_reference(query, cache.heads, rows, exact, scale, ahead, torch.float64)
    # a rounding step of a logit moves its weight by as many as the logit is large, and a sink does
    # not move along; a cap leaves logits near each other whose rounding is that of large products
    moves_alone = scale.sinks is not None or scale.soft_cap > 0
    steps = max(1.0, query_scale) if moves_alone else 1.0
    assert_within_budget(actual, low_precision, exact, rounding_steps=steps)
    assert around is not None
    assert around[:, [0, -1]].isnan().all(), "wrote outside of out"


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("chunk", [1, 5, 37])
def test_reference_equals_dense_attention(group: int, chunk: int) -> None:
    layout = PageLayout(16, 64, torch.float32)
    cache = make_cache([[37, 37]], layout)
    query = strided_randn((chunk, 2 * group, 64), torch.float32, seed=1)
    out = torch.empty(query.shape, dtype=torch.float64)
    rows = batch_rows([0], [chunk])
    attend_reference(query, cache.heads, rows, out, 0.125, None, torch.float64)

    heads = [cache.head(0, head) for head in range(2)]
    keys = torch.stack([key for key, _ in heads]).double().repeat_interleave(group, dim=0)
    values = torch.stack([value for _, value in heads]).double().repeat_interleave(group, dim=0)
    mask = torch.ones(chunk, 37, dtype=torch.bool).tril(37 - chunk)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1), keys, values, attn_mask=mask, scale=0.125
    )
    torch.testing.assert_close(out, dense.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_reference_of_a_picture_equals_dense_attention() -> None:
    """Tokens 3 to 10 of a chunk of 20 see each other, and all see what the head held before."""
    cache = make_cache([[37]], PageLayout(16, 64, torch.float32))
    query = strided_randn((20, 1, 64), torch.float32, seed=1)
    out = torch.empty(query.shape, dtype=torch.float64)
    ahead = both_ways(20, (3, 11))
    attend_reference(query, cache.heads, batch_rows([0], [20]), out, 0.125, ahead, torch.float64)

    keys, values = (x.double() for x in cache.head(0, 0))
    mask = torch.ones(20, 37, dtype=torch.bool).tril(17)
    mask[3:11, 17 + 3 : 17 + 11] = True
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[:, 0].double(), keys, values, attn_mask=mask, scale=0.125
    )
    torch.testing.assert_close(out[:, 0], dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_reference_equals_the_formula(kind: str) -> None:
    """One query head, one query at a time: a sink is a logit whose token has no value."""
    cache = make_cache([[37, 20]], PageLayout(16, 64, torch.float32))
    query = strided_randn((5, 4, 64), torch.float32, seed=1)
    softmax = softmax_of(kind, 64, 4)
    out = torch.empty(query.shape, dtype=torch.float64)
    attend_reference(query, cache.heads, batch_rows([0], [5]), out, softmax, None, torch.float64)
    for head in range(4):
        keys, values = (x.double() for x in cache.head(0, head // 2))
        for token in range(5):
            seen = len(keys) - 4 + token
            logits = keys[:seen] @ query[token, head].double() * softmax.scale
            if softmax.soft_cap:
                logits = softmax.soft_cap * torch.tanh(logits / softmax.soft_cap)
            weights = logits.exp()
            sink = 0.0 if softmax.sinks is None else softmax.sinks[head].double().exp()
            expected = weights @ values[:seen] / (weights.sum() + sink)
            torch.testing.assert_close(out[token, head], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_scale", [0.1, 1.0, 200.0])
def test_softmax(instruction_set: str, kind: str, dtype: torch.dtype, query_scale: float) -> None:
    """Chunks and decodes, of one split and of several; a head without a token, rows that see none.

    Small scores, where a cap must not lose them, and such as it flattens.
    """
    cache = make_cache([[70, 5200], [5000, 0], [8, 33]], PageLayout(16, 64, dtype))
    for tokens in ([9, 1, 20], [1, 1, 1]):
        check_kernel(cache, 5, [0, 1, 2], tokens, query_scale, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(instruction_set: str, head_size: int, dtype: torch.dtype) -> None:
    cache = make_cache([[70, 133], [19, 5]], PageLayout(16, head_size, dtype))
    check_kernel(cache, group=4, slots=[0, 1], tokens=[66, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(instruction_set: str, group: int, dtype: torch.dtype) -> None:
    cache = make_cache([[70, 33], [601, 1], [0, 88]], PageLayout(8, 64, dtype))
    check_kernel(cache, group, slots=[1, 0, 2], tokens=[1, 13, 1])


@pytest.mark.parametrize("page_tokens", [8, 16, 32, 256])
@pytest.mark.parametrize("chunk", [1, 63, 64, 65, 257])
def test_chunks(instruction_set: str, chunk: int, page_tokens: int) -> None:
    """Ragged heads: one just holds the chunk, one is empty, others hold more."""
    lens = [chunk, 0, chunk + 1, chunk + 300]
    cache = make_cache([lens], PageLayout(page_tokens, 32, torch.float32))
    check_kernel(cache, group=2, slots=[0], tokens=[chunk])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batch(instruction_set: str, dtype: torch.dtype) -> None:
    """Prefill, decode, padding and a chunk remainder at once, slots out of order."""
    lens = [[2050, 3], [40, 1100], [90, 64], [512, 513], [0, 0]]
    cache = make_cache(lens, PageLayout(32, 64, dtype))
    check_kernel(cache, group=4, slots=[3, 2, 0, 4, 1], tokens=[1, 62, 1, 0, 5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 72, 256])
def test_quantised_pages(instruction_set: str, head_size: int, dtype: torch.dtype) -> None:
    check_quantised(PageLayout(16, head_size, dtype, is_quantised=True))


def check_quantised(layout: PageLayout) -> None:
    """Chunks and decodes, of one run of keys and of several, with every kind of softmax.

    The last head has few keys, so that weights are large and their rounding shows.
    """
    cache = make_cache([[70, 530], [520, 0], [8, 33]], layout)
    for kind in ("plain", "cap-and-sinks"):
        for tokens in ([9, 1, 20], [1, 1, 1]):
            check_kernel(cache, 3, [0, 1, 2], tokens, kind=kind)
    short = make_cache([[3, 2]], layout)
    for tokens in ([1], [2]):
        check_kernel(short, 2, [0], tokens)


PICTURES = {
    "alone": (70, [(0, 70)]),
    "between text": (70, [(5, 60)]),
    "side by side": (70, [(1, 20), (20, 45), (50, 69)]),
    "of one token": (12, [(4, 5)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    """Behind a decode, in front of a chunk of text; tiles begin and end inside of them."""
    check_pictures(name, dtype)


def check_pictures(name: str, dtype: torch.dtype) -> None:
    chunk, pictures = PICTURES[name]
    cache = make_cache([[90, 33], [chunk, chunk + 41], [9, 300]], PageLayout(16, 64, dtype))
    places = [(1 + first, 1 + stop) for first, stop in pictures]
    ahead = both_ways(chunk + 8, *places)
    check_kernel(cache, 3, [0, 1, 2], [1, chunk, 7], ahead=ahead)
    check_kernel(cache, 3, [0, 1, 2], [1, chunk, 7], kind="cap-and-sinks", ahead=ahead)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_picture_over_several_splits(instruction_set: str, dtype: torch.dtype) -> None:
    """Its first tokens see more cuts of the keys than there are in front of them."""
    cache = make_cache([[4200, 4160]], PageLayout(64, 32, dtype))
    check_kernel(cache, 2, [0], [150], ahead=both_ways(150, (20, 140)))


@pytest.mark.parametrize(
    "ahead", [[0, 2, 0], [0, -1, 0], [2, 0, 0]], ids=["beyond", "negative", "less far"]
)
def test_what_is_ahead_is_checked(ahead: list[int]) -> None:
    cache = make_cache([[40]], PageLayout(16, 32, torch.float32))
    query, rows = torch.zeros(3, 1, 32), batch_rows([0], [3])
    with pytest.raises(IndexError, match="tokens ahead"):
        attend(query, cache.heads, rows, query.clone(), 1.0, torch.tensor(ahead).int())
    with pytest.raises(ValueError, match="ahead is torch.int64"):
        attend(query, cache.heads, rows, query.clone(), 1.0, torch.tensor(ahead))


@pytest.mark.parametrize("chunk", [1, 9])
def test_many_splits(instruction_set: str, chunk: int) -> None:
    """The keys are cut and joined again; the first query sees nothing of the last cut."""
    cache = make_cache([[4096 + chunk - 1, 9001]], PageLayout(64, 32, torch.bfloat16))
    check_kernel(cache, group=2, slots=[0], tokens=[chunk])


@pytest.mark.parametrize("chunk", [1, 40])
def test_large_scores(instruction_set: str, chunk: int) -> None:
    """Scores of several hundred neither overflow nor lose the small weights."""
    cache = make_cache([[700, 90]], PageLayout(16, 64, torch.float32))
    check_kernel(cache, group=2, slots=[0], tokens=[chunk], query_scale=200.0)


def test_query_that_sees_nothing_gets_zeros(instruction_set: str) -> None:
    """A head with fewer tokens than the chunk: the first queries see none of them."""
    cache = make_cache([[2, 0]], PageLayout(8, 32, torch.float32))
    query = strided_randn((5, 4, 32), torch.float32, seed=1)
    out = torch.full(query.shape, torch.nan)
    attend(query, cache.heads, batch_rows([0], [5]), out, 1.0)
    assert (out[:3, :2] == 0).all()
    assert (out[3:, :2] != 0).all()
    assert (out[:, 2:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 30])
def test_result_is_independent_of_batch_and_threads(chunk: int) -> None:
    cache = make_cache([[5000, 700], [800, 90]], PageLayout(16, 64, torch.float32))
    query = strided_randn((2 * chunk, 4, 64), torch.float32, seed=1)
    alone, together = torch.empty_like(query), torch.empty_like(query)
    num_threads = torch.get_num_threads()
    rows = batch_rows([0, 1], [chunk, chunk])
    attend(query, cache.heads, rows, together, 0.125)
    torch.set_num_threads(1)
    attend(query, cache.heads, batch_rows([0], [chunk]), alone, 0.125)
    torch.set_num_threads(num_threads)
    assert torch.equal(alone[:chunk], together[:chunk])


def test_bad_page_id_is_refused(instruction_set: str) -> None:
    cache = make_cache([[40]], PageLayout(16, 32, torch.float32))
    cache.table[0, 0, 1] = -1
    for chunk in (1, 20):
        query = torch.zeros(chunk, 1, 32)
        rows = batch_rows([0], [chunk])
        with pytest.raises(IndexError, match="outside the pool"):
            attend(query, cache.heads, rows, query.clone(), 1.0)


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [([1], [2], "slot 1"), ([0], [3], "there are 2 tokens"), ([0, 0], [2, -1], "falls at row 1")],
    ids=["slot", "tokens", "order"],
)
def test_bad_rows_are_refused(slots: list[int], tokens: list[int], message: str) -> None:
    cache = make_cache([[40]], PageLayout(16, 32, torch.float32))
    query = torch.zeros(2, 1, 32)
    rows = batch_rows(slots, tokens)
    with pytest.raises(IndexError, match=message):
        attend(query, cache.heads, rows, query.clone(), 1.0)


def test_wrong_dtype_is_refused() -> None:
    cache = make_cache([[40]], PageLayout(16, 32, torch.float32))
    query = torch.zeros(2, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="query is torch.bfloat16"):
        attend(query, cache.heads, batch_rows([0], [2]), query, 1.0)


@pytest.mark.parametrize("name", ["generic", "sse9"])
def test_environment_chooses_the_instruction_set(name: str) -> None:
    program = (
        "import torch; from vllm_budgetkv.ops import extension; extension.load();"
        "assert torch.ops.budgetkv.get_isa() == 'generic'"
    )
    environment = os.environ | {"VLLM_BUDGETKV_ISA": name}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if name == "generic":
        assert done.returncode == 0, done.stderr
    else:
        assert "sse9 is unknown" in done.stderr
