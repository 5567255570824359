"""Fixtures of the op tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from vllm_budgetkv.ops import extension

if TYPE_CHECKING:
    from collections.abc import Iterator

INSTRUCTION_SETS = ("amx", "avx512", "avx2", "generic")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each copy of the kernels that this CPU supports."""
    extension.load()
    usual = torch.ops.budgetkv.get_isa()
    try:
        torch.ops.budgetkv.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.budgetkv.set_isa(usual)


@pytest.fixture(params=[False, True], ids=["mean", "largest"])
def takes_largest(request: pytest.FixtureRequest) -> bool:
    """Which mass `score` is asked for."""
    return bool(request.param)
