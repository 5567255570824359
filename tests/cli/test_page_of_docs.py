"""`docs/plan.md` shows what the command writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cli.folders import write_qwen3_vl_8b
from vllm_budgetkv.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"
SHOWN = re.compile(r"    \$ vllm-budgetkv (plan (?:[^\n]*\\\n)*[^\n]*)\n((?:(?:    [^\n]*)?\n)+)")


def shown() -> Iterator[tuple[str, str]]:
    """Each command of the document, and what stands below it."""
    for command, page in SHOWN.findall(DOCUMENT.read_text(encoding="utf-8")):
        yield command.replace("\\\n", " "), page


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("command", "page"), list(shown()), ids=lambda text: text[:12].strip())
def test_the_document_is_up_to_date(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    page: str,
) -> None:
    write_qwen3_vl_8b(tmp_path / "Qwen3-VL-8B-Instruct")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(shlex.split(command)) == 0
    written = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line[4:].rstrip() for line in page.strip("\n").splitlines()] == written


def test_the_document_shows_something() -> None:
    assert len(list(shown())) == 1
