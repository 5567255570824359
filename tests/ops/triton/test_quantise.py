"""`quantise` in Triton against a table of all codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ops import test_quantise as naive
from vllm_budgetkv.ops.quantise import quantise

if TYPE_CHECKING:
    import torch


def test_codes() -> None:
    naive.test_all_codes_round_trip(quantise)
    naive.test_halves_go_to_the_even_code(quantise)
    naive.test_small_numbers(quantise)


# infinities divided by a unit
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_large_numbers() -> None:
    naive.test_large_numbers_become_the_largest(quantise)


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_units(dtype: torch.dtype) -> None:
    naive.check_units(quantise, dtype, [(1, 1, 32), (37, 3, 40), (5, 2, 256)])


def test_no_tokens() -> None:
    naive.test_no_tokens(quantise)
