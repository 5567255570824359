"""`docs/options.md`, made from the options: `python -m vllm_budgetkv.start.options_page`."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.policy.option import about, flag_of, kind_of, may_be
from vllm_budgetkv.policy.options import PolicyFlags, PolicyOptions
from vllm_budgetkv.start.config import budget_options

if TYPE_CHECKING:
    from collections.abc import Iterable
    from dataclasses import Field

INTRODUCTION = """# Options

Made from the options of `vllm_budgetkv/start/config.py` and `vllm_budgetkv/policy/options.py`.

The flag is for every `vllm` command with engine arguments. The key is for
`budget_args(key=value)` and for `additional_config={"budgetkv": {"key": value}}`. All options are
of the engine; a single request has none.
"""
KNOBS = """## Knobs

For ablations, in one JSON object: `--kv-tuning '{"text_share": 0.3}'`, or the key `tuning`.
"""


def as_markdown() -> str:
    """The text of `docs/options.md`."""
    of_policies = fields(PolicyFlags)
    known = {item.name for item in of_policies}
    own = (item for item in budget_options() if item.name not in known)
    knobs = (item for item in fields(PolicyOptions) if item.name not in known)
    parts = [
        INTRODUCTION,
        "## The plugin\n",
        _table(own, has_flag=True),
        "## Policies\n\nA policy reads those that it knows.\n",
        _table(of_policies, has_flag=True),
        KNOBS,
        _table(knobs, has_flag=False),
    ]
    return "\n".join(parts)


def _table(items: Iterable[Field[Any]], has_flag: bool) -> str:
    titles = ["flag"] * has_flag + ["key", "default", "unit", "may be", "meaning"]
    rows = [[_flags(item)] * has_flag + _row(item) for item in items]
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _flags(item: Field[Any]) -> str:
    flag = flag_of(item)
    if kind_of(item) == "bool":
        return f"`{flag}`, `{flag.replace('--', '--no-', 1)}`"
    return f"`{flag}`"


def _row(item: Field[Any]) -> list[str]:
    """Key, default, unit, values and meaning of an option."""
    said = about(item)
    default = "" if item.default is None else f"`{item.default}`"
    values = ", ".join(f"`{choice}`" for choice in said.choices) if said.choices else may_be(item)
    return [f"`{item.name}`", default, (said.metavar or "").lower(), values, said.meaning]


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
