"""The folder of a batch: parts that are whole or not there, and what is done already."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OPTIONS = "run.json"
DRAFT = ".draft"


class Folder:
    """Where answers go: `answers-*.jsonl`, `errors-*.jsonl`, and `run.json` with the options.

    Errors of an earlier run are removed, since their rows are tried again.

    Args:
        path: the folder; made where it is missing.
        arguments: of the server.
        accept_others: whether answers that were made with other arguments may stand there.

    Raises:
        ValueError: answers of other arguments stand there, or another run is writing.
    """

    def __init__(self, path: Path, arguments: Sequence[str], *, accept_others: bool) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.lock = (path / ".lock").open("a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run writes to {path}; wait for it or end it") from error
        try:
            self._check_options(list(arguments), accept_others=accept_others)
        except ValueError:
            self.close()
            raise
        for left in (*path.glob(f"*{DRAFT}"), *path.glob("errors-*.jsonl")):
            left.unlink()
        parts = sorted(path.glob("answers-*.jsonl"))
        self.num_parts = max((int(p.stem.rpartition("-")[2]) for p in parts), default=0)
        self.done = {row["custom_id"]: row["id"] for part in parts for row in _rows(part)}

    def close(self) -> None:
        """Let another run write here."""
        self.lock.close()

    def _check_options(self, arguments: list[str], *, accept_others: bool) -> None:
        file = self.path / OPTIONS
        if file.exists() and not accept_others:
            before = json.loads(file.read_text(encoding="utf-8"))["arguments"]
            if before != arguments:
                raise ValueError(
                    f"the answers in {self.path} were made with {' '.join(before)!r}, not with "
                    f"{' '.join(arguments)!r}: give another folder, or --accept-other-options"
                )
        self._write(OPTIONS, json.dumps({"arguments": arguments}, indent=1) + "\n")

    def is_done(self, custom_id: str, answer_id: str) -> bool:
        """Whether the answer of a row stands here.

        Raises:
            ValueError: the answer of another row of this name stands here.
        """
        found = self.done.get(custom_id)
        if found is not None and found != answer_id:
            raise ValueError(
                f"row {custom_id!r} is not what it was when {self.path} got its answer: give "
                "another folder, or the row another custom_id"
            )
        return found is not None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, each once and whole: after a crash all of a part stands here or nothing."""
        fresh = []
        for row in rows:
            if row["error"] is not None:
                fresh.append(row)
            elif row["custom_id"] not in self.done:
                fresh.append(row)
                self.done[row["custom_id"]] = row["id"]
        self.num_parts += 1
        for kind, is_error in (("answers", False), ("errors", True)):
            lines = [json.dumps(r) for r in fresh if (r["error"] is not None) is is_error]
            if lines:
                self._write(f"{kind}-{self.num_parts:06}.jsonl", "\n".join(lines) + "\n")

    def _write(self, name: str, text: str) -> None:
        draft = self.path / f"{name}{DRAFT}"
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / name)


def _rows(part: Path) -> list[dict[str, Any]]:
    with part.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
