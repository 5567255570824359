"""Guides that tell the same tell it in the same order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_budgetkv.policy import POLICIES

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^(\d+)\. \*\*(.+?)\.\*\*", re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_both_guides_add_a_policy_in_the_same_steps() -> None:
    """Bug: one put options last and left them to `BudgetConfig`, the other to `PolicyOptions`."""
    short = text_of("CONTRIBUTING.md").split("## Adding a policy")[1].split("\n## ")[0]
    steps = STEP.findall(short)
    assert steps == STEP.findall(text_of("docs/adding_a_policy.md"))
    assert [int(number) for number, _ in steps] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", POLICIES)
def test_the_readme_knows_every_policy(name: str) -> None:
    table = text_of("README.md").split("### Policies")[1].split("\n## ")[0]
    assert f"`{name}`" in table
