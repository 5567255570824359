"""Makes docs/models.md from results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families.catalogue import FAMILIES

if TYPE_CHECKING:
    from tests.families.family import Family

HEAD = """# Models

Made by `tests/families/run.py` from what it found (`tests/families/results.json`); do not edit it.

Of each family a tiny instance is built from its configuration, of two to eight layers and noise as
weights, scaled so that answers depend on what is read, and asked text, pictures and a video where
it reads them. A row that says *served* has shown three things, on vLLM 0.32, on a CPU:

- **lossless**: with a quota above need, stock vLLM's tokens, and its log-probabilities within the
  number that is given; in bfloat16, which vLLM's kernels for CPUs demand of models with recurrent
  state, the same tokens up to one that stock finds as likely as another; where vLLM itself does
  not run a family on a CPU, those of Transformers' class. Where tokens of a picture attend to each
  other both ways, which vLLM's attention for CPUs does not do, stock is made to
  (`tests/e2e/both_ways.py`, which answers as Transformers does);
- **bound**: four requests at once, each of ten times its quota and more, with the ledger checked
  and free memory poisoned after every step, never hold more than their quota;
- **probe**: the start has proven how the queries of each layer turn. Beside it the worst relative
  error of queries that were turned, against those that the model makes there.

Nothing here says how good answers are under a quota: [experiments](experiments.md) do. Layers that
are `full` are under the quota; others keep their own, bounded cache. A refusal is what the start
says.

All of it, within three quarters of an hour on two cores:

    python -m tests.families.run

Some, half a minute each and two more for other modes; the other rows stay:

    python -m tests.families.run --only "Qwen3-VL" "Gemma 3"

"""
COLUMNS = "| family | vLLM class | layers | positions | special | outcome | tested here |"


def page_of(results: dict[str, Any]) -> str:
    """The page, of results by name of the family."""
    rows = [row_of(family, results.get(family.name, {})) for family in FAMILIES.values()]
    kept = [found["verdict"] for found in results.values() if "failed" not in found]
    counts = {verdict: kept.count(verdict) for verdict in ("served", "refused", "not built")}
    numbers = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    divider = "|" + "---|" * 7
    return f"{HEAD}{numbers}.\n\n" + "\n".join([COLUMNS, divider, *rows]) + "\n"


def row_of(family: Family, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        family.name,
        f"`{found.get('class', family.architecture)}`",
        layers_of(found),
        found.get("positions", ""),
        family.special,
        outcome_of(found),
        tested_of(found),
    ]
    return f"| {' | '.join(cells)} |"


def layers_of(found: dict[str, Any]) -> str:
    """Layers by kind."""
    return ", ".join(f"{count} {kind}" for kind, count in found.get("layers", {}).items())


def outcome_of(found: dict[str, Any]) -> str:
    """Served, refused with these words, or not built for this reason."""
    if not found:
        return "not run"
    if "failed" in found:
        return "**not as promised**"
    reason = found.get("reason")
    return found["verdict"] + (f": {reason}" if reason else "")


def tested_of(found: dict[str, Any]) -> str:
    """Model runners, and what was found on each."""
    return "; ".join(
        f"{mode}, {found['dtype']}: {numbers_of(shown)}"
        for mode, shown in found.get("tested", {}).items()
    )


def numbers_of(shown: dict[str, Any]) -> str:
    """The three things in numbers."""
    lossless, bound, probe = shown["lossless"], shown["bound"], shown["probe"]
    same = f"{lossless['tokens']} tokens within {lossless['error']:.0e}"
    held = f"{bound['prompt_tokens']} tokens in {bound['quota_tokens']}"
    turned = f"{probe['turned']} of {probe['layers']} layers turn, off by {probe['error']:.0e}"
    return f"{same}; {held}; {turned if probe['turned'] else 'no layer turns'}"
