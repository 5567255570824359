"""Reference of `quantise`: the spec of the kernels, in plain torch."""

from __future__ import annotations

import torch

from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE


def quantise(
    key: torch.Tensor, value: torch.Tensor, key_unit: float, value_unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vllm_budgetkv.ops.quantise.quantise`."""
    largest = torch.finfo(QUANTISED_DTYPE).max
    key, value = (
        (tokens.float() / unit).clamp(-largest, largest).to(QUANTISED_DTYPE).contiguous()
        for tokens, unit in ((key, key_unit), (value, value_unit))
    )
    return key, value
