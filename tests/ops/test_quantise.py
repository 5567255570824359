"""`quantise`: the reference and the kernels against a table of all codes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import strided_randn
from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE
from vllm_budgetkv.ops.quantise import quantise
from vllm_budgetkv.ops.reference.quantise import quantise as quantise_reference

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = pytest.mark.parametrize("op", [quantise_reference, quantise], ids=["reference", "op"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# what codes from 0 to 126 stand for, by the format's definition: 4 bits of exponent, 3 of mantissa
SIZES = torch.tensor(
    [math.ldexp(code % 8 + 8 * (code >= 8), max(code // 8, 1) - 10) for code in range(127)],
    dtype=torch.float64,
)
MAX_CODE, NAN_CODE, SIGN = 126, 127, 128
LARGEST = 448.0


def nearest_codes(numbers: torch.Tensor) -> torch.Tensor:
    """uint8, as float32 `numbers`: codes by search; NaN has that of NaN without its sign."""
    size = numbers.double().abs().nan_to_num(posinf=LARGEST).clamp(max=LARGEST)
    above = torch.searchsorted(SIZES, size.contiguous()).clamp(1, MAX_CODE)
    low, high = size - SIZES[above - 1], SIZES[above] - size
    is_above = (high < low) | ((high == low) & (above % 2 == 0))
    code = torch.where(is_above, above, above - 1) + SIGN * numbers.signbit()
    return code.masked_fill(numbers.isnan(), NAN_CODE).to(torch.uint8)


def codes_of(stored: torch.Tensor) -> torch.Tensor:
    """uint8, as float8 `stored`; NaN without its sign, which means nothing."""
    code = stored.view(torch.uint8)
    return code.masked_fill(code == NAN_CODE + SIGN, NAN_CODE)


def check(
    op: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    key: torch.Tensor,
    value: torch.Tensor,
    key_unit: float = 1.0,
    value_unit: float = 1.0,
) -> None:
    """Every code of both, [T, H, D], and that they are made anew."""
    units, before = (key_unit, value_unit), (key.clone(), value.clone())
    stored = op(key, value, *units)
    for given, was, unit, found in zip((key, value), before, units, stored, strict=True):
        assert found.dtype == QUANTISED_DTYPE and found.shape == given.shape
        assert found.is_contiguous()
        wanted = nearest_codes(given.float() / torch.tensor(unit))
        assert torch.equal(codes_of(found), wanted)
        torch.testing.assert_close(given, was, rtol=0, atol=0, equal_nan=True)


def check_numbers(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], *numbers: float) -> None:
    """In every dtype that has them, and their negatives, as keys and as values."""
    for dtype in DTYPES:
        exact = torch.tensor(numbers, dtype=torch.float64)
        given = exact[(exact.to(dtype).double() == exact) | exact.isnan()].to(dtype)
        given = torch.nn.functional.pad(given, (0, -len(given) % 32)).view(-1, 1, 32)
        check(op, given, -given)


@OPS
def test_all_codes_round_trip(op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """With every unit that is a power of two, as far as the dtype has the numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(QUANTISED_DTYPE).float().view(2, 4, 32)
    for dtype in DTYPES:
        for unit in (1.0, 0.25, 8.0):
            given = (numbers * unit).to(dtype)
            assert torch.equal((given.float() / unit).nan_to_num(), numbers.nan_to_num())
            for stored in op(given, given, unit, unit):
                assert torch.equal(codes_of(stored).flatten(), codes_of(codes))


@OPS
def test_halves_go_to_the_even_code(op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """All numbers between two codes, of subnormals and of normals, and their neighbours."""
    halves = (SIZES[:-1] + SIZES[1:]) / 2
    check_numbers(op, *halves.tolist())
    for dtype in DTYPES:
        for towards in (0.0, 1000.0):
            given = torch.nextafter(halves.to(dtype), torch.tensor(towards, dtype=dtype))
            check_numbers(op, *given.tolist())


@OPS
def test_small_numbers(op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Zeros of both signs, subnormals of every dtype, and where the codes' subnormals begin."""
    tiny = [math.ldexp(1.0, power) for power in (-149, -133, -126, -24, -14, -11, -10, -9, -6)]
    check_numbers(op, 0.0, *tiny, *(1.5 * number for number in tiny), math.ldexp(7.5, -9))


@OPS
def test_large_numbers_become_the_largest(
    op: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """480 has no code, so 464 is between none; infinities are numbers, and NaN is none."""
    largest = [torch.finfo(dtype).max for dtype in DTYPES]
    check_numbers(op, 432.0, 440.0, 447.0, 448.0, 449.0, 464.0, 465.0, 480.0, 1e4, *largest)
    check_numbers(op, 1.0, torch.inf, 2.0, torch.nan, 3.0)


@OPS
@EVERY_DTYPE
def test_units(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
    """That are no powers of two, other ones for keys and values, of tensors that lie apart."""
    check_units(op, dtype, [(1, 1, 32), (37, 3, 40), (5, 2, 256)])


def check_units(
    op: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    shapes: list[tuple[int, int, int]],
) -> None:
    for shape in shapes:
        spread = torch.logspace(-3, 3, shape[-1]).to(dtype)
        for units in ((0.7, 0.031), (3.3, 1e-3), (0.1, 117.0)):
            key, value = (strided_randn(shape, dtype, seed=seed) for seed in (1, 2))
            check(op, key, value.mul_(spread), *units)
            # what is half way for a quotient that is rounded, and would not be for a product
            halves = ((SIZES[:-1] + SIZES[1:]) / 2 * units[0]).to(dtype)[: shape[-1]]
            key[:] = torch.nn.functional.pad(halves, (0, shape[-1] - len(halves)))
            check(op, key, value, *units)


def test_kernels_of_every_instruction_set(instruction_set: str) -> None:
    for dtype in DTYPES:
        check_units(quantise, dtype, [(37, 3, 40), (5, 2, 256)])
    test_halves_go_to_the_even_code(quantise)
    test_large_numbers_become_the_largest(quantise)
    assert instruction_set


@OPS
def test_no_tokens(op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    for stored in op(torch.empty(0, 2, 32), torch.empty(0, 2, 32), 1.0, 1.0):
        assert stored.shape == (0, 2, 32) and stored.dtype == QUANTISED_DTYPE


def test_wrong_arguments_are_refused() -> None:
    key = torch.zeros(2, 3, 32)
    with pytest.raises(ValueError, match="key_unit is 0.0; it must be positive"):
        quantise(key, key, 0.0, 1.0)
    with pytest.raises(ValueError, match="value_unit is nan; it must be positive"):
        quantise(key, key, 1.0, math.nan)
    with pytest.raises(ValueError, match=r"value is torch\.bfloat16"):
        quantise(key, key.bfloat16(), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"value is .* pass torch.float32 \[2, 3, 32\]"):
        quantise(key, key[:1], 1.0, 1.0)
