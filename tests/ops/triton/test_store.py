"""`store` and `load` in Triton against naive ones."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_store as naive
from tests.ops.factories import batch_rows, strided_randn
from tests.ops.recall_factory import make_remembered
from vllm_budgetkv.ops import load, store


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_store(dtype: torch.dtype) -> None:
    naive.test_store_writes_each_token_to_its_place(store, dtype)


def test_store_leaves_out_what_has_no_place() -> None:
    """Nor does it write for a slot or to a block that is out of range."""
    naive.test_store_leaves_out_what_has_no_block(store)
    made = make_remembered([40], naive.LAYOUT)
    made.tier.blocks[0, 1] = made.tier.tokens.shape[0]
    rows = batch_rows([-1, 1, 0], [3, 3, 3])._replace(
        first_position=torch.tensor([0, 0, 15], dtype=torch.int32)
    )
    new = strided_randn((9, 2, 32), torch.float32, seed=1)
    tokens = naive.stored(store, made, rows, new, new)
    assert int((~tokens.isnan()).any(-1)[:, 0, 0].sum()) == 1


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_load(dtype: torch.dtype) -> None:
    naive.test_load_reads_what_was_stored(load, dtype)


def test_load_leaves_what_has_no_place() -> None:
    naive.test_load_leaves_what_has_no_block(load)


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    naive.test_quantised_pages(dtype)
