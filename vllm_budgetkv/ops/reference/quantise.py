"""Reference of `quantise`: the spec of the kernels, in plain torch."""

from __future__ import annotations

import torch

from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE


def quantise(
    key: torch.Tensor, value: torch.Tensor, key_unit: float, value_unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vllm_budgetkv.ops.quantise.quantise`."""
    return _quantise(key, key_unit), _quantise(value, value_unit)


def _quantise(tokens: torch.Tensor, unit: float) -> torch.Tensor:
    largest = torch.finfo(QUANTISED_DTYPE).max
    # on a GPU torch would multiply by the inverse of a number of Python's
    quotient = tokens.float() / torch.full((), unit, device=tokens.device)
    return quotient.clamp(-largest, largest).to(QUANTISED_DTYPE).contiguous()
