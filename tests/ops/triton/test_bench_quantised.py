"""The checks of kernels on quantised pages, and where there can be none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.kernels import checks
from benchmarks.kernels.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize("has_type", [True, False])
def test_every_size_is_checked_quantised_too(
    monkeypatch: pytest.MonkeyPatch, has_type: bool
) -> None:
    """A failure names its pages, and a GPU without their type is told of."""

    def check(*arguments: Any, is_quantised: bool) -> Iterator[Verdict]:
        yield Verdict("attend", "decode", float(is_quantised), 0.0)

    monkeypatch.setattr(checks, "check", check)
    monkeypatch.setattr(checks, "has_quantised_type", lambda device: has_type)
    said: list[str] = []
    verdicts = checks.run_checks([checks.SMALL], torch.device("cpu"), said.append)
    assert [each.what for each in verdicts if each.holds] == ["decode"] * 2
    wrong = [each.what for each in verdicts if not each.holds]
    assert wrong == ["decode, quantised"] * 3 * has_type
    assert len(said) == (3 if has_type else 1)
    assert all("quantised" in line for line in said)
