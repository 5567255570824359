"""What is a row of a batch, and what is wrong with those that are none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from vllm_budgetkv.batch.rows import CHAT_URL, BadRow, Row, answer_of, error_of, index

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES = [{"role": "user", "content": "who?"}]


def in_format(custom_id: str, **other: Any) -> dict[str, Any]:
    """A row of OpenAI's batch format."""
    body = {"model": "m", "messages": MESSAGES}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT_URL, "body": body, **other}


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "in.jsonl"
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_rows_are_read_where_they_stand(tmp_path: Path) -> None:
    """Offsets are of bytes: a row behind one with letters of two bytes is read whole."""
    plain = {"custom_id": "ü", "messages": MESSAGES, "max_tokens": 3}
    path = written(tmp_path, in_format("a", note="müßig"), "", "   ", plain)
    first, second = index(path)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.line, second.line, second.custom_id) == (1, 4, "ü")
    assert first.read(path) == (CHAT_URL, {"model": "m", "messages": MESSAGES})
    assert second.read(path) == (CHAT_URL, {"messages": MESSAGES, "max_tokens": 3})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "custom_id"),
        ({"messages": MESSAGES}, "custom_id"),
        ({"custom_id": 7, "messages": MESSAGES}, "custom_id"),
        (in_format("good"), "'good' stands in line 1 already"),
        ({"custom_id": "x"}, "a body, or messages"),
        (in_format("x", body=[]), "body must be an object"),
        (in_format("x", url="/metrics"), "/metrics"),
        (in_format("x", url=None), "url must be"),
        (in_format("x", method="GET"), "GET"),
        (in_format("x", body={"messages": MESSAGES, "stream": True}), "stream"),
    ],
)
def test_a_bad_row_is_told_beside_good_ones(tmp_path: Path, row: Any, words: str) -> None:
    _, bad, last = index(written(tmp_path, in_format("good"), row, in_format("last")))
    assert isinstance(bad, BadRow) and isinstance(last, Row)
    told = error_of(bad)
    assert words in told["error"]["message"]
    assert (told["line"], told["response"]) == (2, None)


def test_a_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    path = written(tmp_path, in_format("a"))
    (row,) = index(path)
    assert isinstance(row, Row)
    path.write_text(path.read_text(encoding="utf-8").replace("who", "why"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        row.read(path)


@pytest.mark.parametrize("status_code", [200, 400])
def test_an_answer_is_an_answer_or_an_error(tmp_path: Path, status_code: int) -> None:
    (row,) = index(written(tmp_path, in_format("a")))
    assert isinstance(row, Row)
    body = {"choices": []} if status_code == 200 else {"error": {"message": "no"}}
    told = answer_of(row, status_code, body, "host:1")
    assert told["response"]["status_code"] == status_code
    assert (told["response"]["body"] is None) is (status_code != 200)
    assert told["error"] == body.get("error")
