"""What a comparison says: how large an error is, and how large it may be."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """One comparison: the largest error and the largest that is allowed."""

    op: str
    what: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed


def within_budget(
    op: str, what: str, actual: torch.Tensor, low_precision: torch.Tensor, exact: torch.Tensor
) -> Verdict:
    """A verdict on numbers that are rounded; an infinite error if they are not all finite."""
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    allowed = 2 * ((low_precision.double() - exact.double()).abs().max().item() + rounding)
    error = (actual.double() - exact.double()).abs().max().item()
    return Verdict(op, what, error, allowed)


def same_bits(op: str, what: str, actual: torch.Tensor, expected: torch.Tensor) -> Verdict:
    """A verdict on what must not differ in one bit; the error counts the elements that do."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = sizes[actual.element_size()]
    differing = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    return Verdict(op, what, float(differing.sum()), 0.0)


def wrong_ops(verdicts: list[Verdict]) -> set[str]:
    """Ops of which a comparison failed."""
    return {verdict.op for verdict in verdicts if not verdict.holds}
