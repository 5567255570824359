"""`vllm-budgetkv doctor`: one finding after the other, what to do, and the exit status."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vllm_budgetkv.cli.findings import Finding, State

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKS = {State.OK: ("ok", "green"), State.NOTE: ("note", "yellow"), State.WRONG: ("WRONG", "red")}


def run_doctor(*, as_json: bool, console: Console | None = None) -> int:
    """Examine this installation and tell.

    Returns:
        The exit status: 1 if something is wrong.
    """
    console = console or Console(highlight=False)
    # what vLLM logs while it is imported is no finding
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    found = list(examine())
    wrong = [finding for finding in found if finding.state is State.WRONG]
    if as_json:
        told = {"is_well": not wrong, "findings": [asdict(finding) for finding in found]}
        console.out(json.dumps(told, indent=2), highlight=False)
    else:
        _show(found, console)
    return 1 if wrong else 0


def examine() -> Iterator[Finding]:
    """All findings, in the order in which a start would meet them."""
    from vllm_budgetkv.cli import device, installation, kernels

    yield from installation.findings()
    yield from device.findings()
    yield from kernels.findings()


def _show(found: list[Finding], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in found:
        mark, colour = MARKS[finding.state]
        table.add_row(f"[{colour}]{mark}[/]", finding.name, _plain(finding.told))
        if finding.to_do:
            table.add_row("", "", f"[bold]-> {_plain(finding.to_do)}[/]")
    console.print(table)
    wrong = sum(finding.state is State.WRONG for finding in found)
    console.print()
    if not wrong:
        console.print("All is well.", style="bold green")
    else:
        things = "thing is" if wrong == 1 else "things are"
        console.print(f"{wrong} {things} wrong.", style="bold red")


def _plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", "\\[")
