"""Rows of an input file, in OpenAI's batch format, and the rows that are written for them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHAT_URL = "/v1/chat/completions"


@dataclass(frozen=True)
class Row:
    """A row that can be sent to a server.

    Args:
        line: its number in the file, from 1.
        offset_bytes, length_bytes: where it stands in the file.
        custom_id: its name, unique in the file.
        key: digest of its bytes; an edited row has another.
    """

    line: int
    offset_bytes: int
    length_bytes: int
    custom_id: str
    key: str

    def read(self, path: Path) -> tuple[str, dict[str, Any]]:
        """The URL and the body that the row asks for.

        Raises:
            ValueError: the file is no more what it was when it was indexed.
        """
        with path.open("rb") as file:
            file.seek(self.offset_bytes)
            text = file.read(self.length_bytes)
        if key_of(text) != self.key:
            raise ValueError(f"line {self.line} of {path} changed while the batch ran")
        return request_of(json.loads(text))


@dataclass(frozen=True)
class BadRow:
    """A row that no server can be asked; `custom_id` is None where it has none."""

    line: int
    custom_id: str | None
    key: str
    error: str


def index(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file in its order, without their bodies; empty lines are none.

    Args:
        path: JSON lines: a row is `{"custom_id", "method", "url", "body"}`, or `custom_id` beside
            the fields of a chat completion.
    """
    lines: dict[str, int] = {}
    offset_bytes = 0
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            start_bytes, offset_bytes = offset_bytes, offset_bytes + len(text)
            if not text.strip():
                continue
            custom_id, error = _judge(text, lines)
            if error is not None or custom_id is None:
                yield BadRow(line, custom_id, key_of(text), error or "")
                continue
            lines[custom_id] = line
            yield Row(line, start_bytes, len(text), custom_id, key_of(text))


def _judge(text: bytes, lines: dict[str, int]) -> tuple[str | None, str | None]:
    """The name of a row, and what is wrong with it; `lines` has those in front of it."""
    try:
        row = json.loads(text)
    except ValueError as error:
        return None, f"not JSON: {error}"
    custom_id = row.get("custom_id") if isinstance(row, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        return None, "must be an object with a custom_id, a string that no other row has"
    if custom_id in lines:
        return custom_id, f"custom_id {custom_id!r} stands in line {lines[custom_id]} already"
    try:
        request_of(row)
    except ValueError as error:
        return custom_id, str(error)
    return custom_id, None


def request_of(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The URL and the body of a row.

    Raises:
        ValueError: a row that asks for nothing, or for what a file cannot hold.
    """
    if "body" not in row:
        url, body = CHAT_URL, {name: row[name] for name in row if name != "custom_id"}
        if "messages" not in body:
            raise ValueError("must have a body, or messages beside the custom_id")
    else:
        url, body = row.get("url", CHAT_URL), row["body"]
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if not isinstance(url, str) or not url.startswith("/v1/"):
        raise ValueError(f"url must be one of the server's, as {CHAT_URL}; got {url!r}")
    if row.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST; got {row['method']!r}")
    if body.get("stream"):
        raise ValueError("stream must not be asked for in a batch")
    return url, body


def key_of(text: bytes) -> str:
    """Digest of a row's bytes, without the white space around them."""
    return hashlib.blake2b(text.strip(), digest_size=12).hexdigest()


def answer_of(row: Row, status_code: int, body: dict[str, Any], worker: str) -> dict[str, Any]:
    """What is written for a row that was asked.

    Args:
        row: the row.
        status_code: of HTTP.
        body: the server's answer.
        worker: host and process that asked.
    """
    failed = status_code != 200
    return {
        "id": f"budgetkv-{row.key}",
        "custom_id": row.custom_id,
        "line": row.line,
        "worker": worker,
        "response": {"status_code": status_code, "body": None if failed else body},
        "error": body.get("error", body) if failed else None,
    }


def error_of(row: BadRow) -> dict[str, Any]:
    """What is written for a row that no server was asked."""
    return {
        "id": f"budgetkv-{row.key}",
        "custom_id": row.custom_id,
        "line": row.line,
        "response": None,
        "error": {"message": row.error, "type": "BadRowError"},
    }


def as_item(row: Row) -> dict[str, Any]:
    """The fields of a row, as a table has them."""
    return asdict(row)
