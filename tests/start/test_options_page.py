"""`docs/options.md` is made from the options and tells all of them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from vllm_budgetkv.policy import PolicyOptions
from vllm_budgetkv.policy.option import flag_of
from vllm_budgetkv.start.config import budget_options
from vllm_budgetkv.start.options_page import as_markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == as_markdown(), (
        "run `python -m vllm_budgetkv.start.options_page > docs/options.md`"
    )


def test_every_option_has_one_row() -> None:
    rows = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    options = budget_options()
    knobs = [item for item in fields(PolicyOptions) if item.name not in {o.name for o in options}]
    expected = [f"| `{flag_of(item)}`" for item in options] + [f"| `{k.name}` |" for k in knobs]
    assert len(rows) == len(expected)
    for row, start in zip(rows, expected, strict=True):
        assert row.startswith(start)
        assert row.count("|") == (7 if "| `--kv" in start else 6), row
