"""Numbers of the host to the device, without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def upload(
    values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A tensor of `values` on `device`, in the order of what was launched before.

    A copy to a GPU from memory that is not pinned would return only once everything launched
    before it has run, so that the host could prepare nothing meanwhile.
    """
    is_pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=is_pinned).to(device, non_blocking=True)
