"""`docs/troubleshooting.md` quotes messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# vLLM's argument parser says it
OF_OTHERS = {"unrecognized arguments: --kv-policy"}


def headings() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### (.+)$", text, re.MULTILINE)


def written(node: ast.JoinedStr | ast.Constant) -> str:
    """What a string of the source says, "..." for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        written(part) if isinstance(part, ast.Constant) else "..." for part in node.values
    )


def messages() -> list[str]:
    """Every string of the package; `%d` and `%s` of logs are values too."""
    found = []
    for path in (ROOT / "vllm_budgetkv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                found.append(re.sub(r"%[ds]", "...", written(node)))
    return found


@pytest.mark.parametrize("heading", headings())
def test_the_message_exists(heading: str) -> None:
    if heading in OF_OTHERS:
        return
    parts = [re.escape(part) for part in heading.split("...")]
    pattern = re.compile(r".*?".join(parts), re.DOTALL)
    assert any(pattern.search(message) for message in messages()), heading


def test_there_is_something_to_read() -> None:
    assert len(headings()) > 10
