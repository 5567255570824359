"""The folder of a batch after crashes, restarts and other options."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vllm_budgetkv import ray as command
from vllm_budgetkv.batch.folder import Folder

if TYPE_CHECKING:
    from pathlib import Path

ARGUMENTS = ["--model", "m", "--kv-page-quota", "12"]


def answer(name: str, *, error: Any = None) -> dict[str, Any]:
    body = {"kv_transfer_params": {"budgetkv": {"peak_blocks": 2, "full_cache_blocks": 9}}}
    response = None if error else {"status_code": 200, "body": body}
    return {"id": f"budgetkv-{name}", "custom_id": name, "response": response, "error": error}


def opened(path: Path, arguments: list[str] | None = None, *, accept_others: bool = False) -> Any:
    return Folder(path, ARGUMENTS if arguments is None else arguments, accept_others=accept_others)


def rows(path: Path, kind: str) -> list[str]:
    """Names of the rows that were written, in their order."""
    texts = [part.read_text(encoding="utf-8") for part in sorted(path.glob(f"{kind}-*.jsonl"))]
    return [json.loads(line)["custom_id"] for text in texts for line in text.splitlines()]


def test_a_restart_knows_what_is_done(tmp_path: Path) -> None:
    """Errors are tried again, and what was half written when the power went is nothing."""
    folder = opened(tmp_path)
    folder.write([answer("a"), answer("b", error="no")])
    folder.write([answer("c")])
    (tmp_path / "answers-000003.jsonl.draft").write_text('{"custom_id": "d"', encoding="utf-8")
    folder.close()
    again = opened(tmp_path)
    found = [again.is_done(name, f"budgetkv-{name}") for name in "abcd"]
    assert found == [True, False, True, False]
    assert rows(tmp_path, "errors") == []
    again.write([answer("b"), answer("d")])
    assert rows(tmp_path, "answers") == ["a", "c", "b", "d"]
    assert list(tmp_path.glob("*.draft")) == []


def test_a_row_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    """A worker that is killed behind its answer is asked again."""
    folder = opened(tmp_path)
    folder.write([answer("a")])
    folder.write([answer("a"), answer("b")])
    assert rows(tmp_path, "answers") == ["a", "b"]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write([answer("a")])
    with pytest.raises(ValueError, match="another run writes"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="row 'a' is not what it was"):
        folder.is_done("a", "budgetkv-edited")
    folder.close()
    others = [*ARGUMENTS[:-1], "16"]
    with pytest.raises(ValueError, match="--kv-page-quota 12.*--kv-page-quota 16") as refused:
        opened(tmp_path, others)
    assert "--accept-other-options" in str(refused.value)
    accepted = opened(tmp_path, others, accept_others=True)
    assert accepted.is_done("a", "budgetkv-a")


def run(tmp_path: Path, *arguments: str) -> int:
    return command.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out"), *arguments])


def test_the_command_starts_nothing_when_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor when all that is left is bad; without Ray, what is left is told how to get it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    messages = [{"role": "user", "content": "who?"}]
    row = json.dumps({"custom_id": "a", "messages": messages})
    (tmp_path / "in.jsonl").write_text(f"{row}\nnothing\n", encoding="utf-8")
    assert run(tmp_path, *ARGUMENTS) == 1
    told = capsys.readouterr().err
    assert "pip install 'vllm-budgetkv[ray]'" in told and "run it again" in told
    assert rows(tmp_path / "out", "errors") == [None]

    (found,) = [row for row in command.index(tmp_path / "in.jsonl") if row.custom_id]
    folder = opened(tmp_path / "out")
    folder.write([{**answer("a"), "id": f"budgetkv-{found.key}"}])
    folder.close()
    assert run(tmp_path, *ARGUMENTS) == 0
    told = capsys.readouterr().err
    assert "1 of 2 rows answered, 1 with an error, 1 by an earlier run" in told
    assert rows(tmp_path / "out", "answers") == ["a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--workers", "0"], "must be at least 1"), ([], "No such file")],
)
def test_what_cannot_start_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, *arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
