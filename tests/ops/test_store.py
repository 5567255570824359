"""`store` and `load`: the references and the kernels against naive ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import batch_rows, is_same, strided_randn
from tests.ops.recall_factory import Remembered, make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import TierLayer, load, store
from vllm_budgetkv.ops.reference.load import load as load_reference
from vllm_budgetkv.ops.reference.store import store as store_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_budgetkv.ops import BatchRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_TOKENS = (700, 333)
LAYOUT = PageLayout(16, 32, torch.float32)


def stored(
    op: Callable[..., None], made: Remembered, rows: BatchRows, *new: torch.Tensor
) -> torch.Tensor:
    tokens = torch.full_like(made.tier.tokens, torch.nan)
    op(*new, rows, TierLayer(tokens, made.tier.blocks))
    return tokens


@pytest.mark.parametrize("op", [store_reference, store], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_writes_each_token_to_its_place(op: Callable[..., None], dtype: torch.dtype) -> None:
    check_store(op, PageLayout(16, 40, dtype))


def check_store(op: Callable[..., None], layout: PageLayout) -> None:
    made = make_remembered(NUM_TOKENS, layout)
    counts, firsts = (1, 70, 0), (332, 0, 9)
    rows = batch_rows([1, 0, 1], counts)._replace(first_position=torch.tensor(firsts).int())
    key, value = (strided_randn((sum(counts), 2, 40), layout.kv_dtype, seed=s) for s in (1, 2))
    tokens = stored(op, made, rows, key, value)
    seen = torch.zeros(tokens.shape[:5:2][:1] + tokens.shape[3:4], dtype=torch.bool)
    token = 0
    for slot, count, first in zip([1, 0, 1], counts, firsts, strict=True):
        for position in range(first, first + count):
            block, offset = int(made.tier.blocks[slot, position // 16]), position % 16
            assert is_same(tokens[block, :, 0, offset], key[token])
            assert is_same(tokens[block, :, 1, offset], value[token])
            seen[block, offset] = True
            token += 1
    # and nothing else
    assert tokens.isnan().all(-1).all(1).all(1)[~seen].all()


@pytest.mark.parametrize("op", [store_reference, store], ids=["reference", "op"])
def test_store_leaves_out_what_has_no_block(op: Callable[..., None]) -> None:
    """Output stands behind the blocks of a prompt, and other requests have none."""
    made = make_remembered(NUM_TOKENS, LAYOUT)
    made.tier.blocks[1] = -1
    rows = batch_rows([0, 1], [100, 40])._replace(first_position=torch.tensor([690, 0]).int())
    key, value = (strided_randn((140, 2, 32), torch.float32, seed=s) for s in (1, 2))
    tokens = stored(op, made, rows, key, value)
    # 700 tokens end inside a block of 16, which has room for 704
    assert int((~tokens.isnan()).any(-1)[:, 0, 0].sum()) == 704 - 690


@pytest.mark.parametrize("op", [load_reference, load], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_load_reads_what_was_stored(op: Callable[..., None], dtype: torch.dtype) -> None:
    check_load(op, PageLayout(16, 40, dtype))


def check_load(op: Callable[..., None], layout: PageLayout) -> None:
    made = make_remembered(NUM_TOKENS, layout)
    counts, firsts = (1, 70, 0), (332, 0, 9)
    rows = batch_rows([1, 0, 1], counts)._replace(first_position=torch.tensor(firsts).int())
    key, value = (strided_randn((sum(counts), 2, 40), layout.kv_dtype, seed=s) for s in (1, 2))
    tier = TierLayer(stored(store_reference, made, rows, key, value), made.tier.blocks)
    before = tier.tokens.clone()
    found = [torch.full_like(new, torch.nan) for new in (key, value)]
    op(*found, rows, tier)
    assert is_same(found[0], key) and is_same(found[1], value)
    assert torch.equal(tier.tokens.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("op", [load_reference, load], ids=["reference", "op"])
def test_load_leaves_what_has_no_block(op: Callable[..., None]) -> None:
    made = make_remembered(NUM_TOKENS, LAYOUT)
    made.tier.blocks[1] = -1
    rows = batch_rows([0, 1], [100, 40])._replace(first_position=torch.tensor([690, 0]).int())
    key, value = (torch.full((140, 2, 32), torch.nan) for _ in range(2))
    made.tier.tokens.nan_to_num_()
    op(key, value, rows, made.tier)
    for found in (key, value):
        read = ~found.isnan().flatten(1).any(1)
        assert read.nonzero().flatten().tolist() == [*range(704 - 690)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    layout = PageLayout(16, 40, dtype, is_quantised=True)
    for op in (store_reference, store):
        check_store(op, layout)
    for op in (load_reference, load):
        check_load(op, layout)
