"""The report file: refused at start where it cannot be written, whole lines after that."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cache.client import Client
from tests.cache.lab import Lab
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache import notices
from vllm_budgetkv.cache.report import RequestRecord
from vllm_budgetkv.cache.report_file import append_line, check_report_file

if TYPE_CHECKING:
    from collections.abc import Callable

QUOTA = Quota(blocks=9, page_tokens=8, num_layers=2, chunk_tokens=20, decode_interval_tokens=4)
RECORD = RequestRecord(
    request_id="r",
    policy="hybrid",
    quota_blocks=9,
    page_tokens=8,
    block_tokens=8,
    prompt_tokens=4,
    block_bytes=8,
)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of this test."""
    lines: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", lambda text, *args: lines.append(text % args))
    notices.warn_once.cache_clear()
    return lines


def missing(folder: Path) -> Path:
    return folder / "missing" / "r.jsonl"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def full_disk(folder: Path) -> Path:
    return Path("/dev/full")


UNWRITABLE = [missing, lambda folder: folder, pipe, lambda folder: folder / "a\0b"]
NAMES = ["no-directory", "a-directory", "a-pipe-that-no-one-reads", "no-name"]


@pytest.mark.parametrize("make", UNWRITABLE, ids=NAMES)
def test_what_cannot_be_written_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ValueError, match="--kv-report-file .* cannot be written .*: name a file"):
        check_report_file(str(make(tmp_path)))


def test_a_directory_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    # root may write anywhere, so the kernel's answer is a double
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        check_report_file(tmp_path / "r.jsonl")


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    append_line(file, b"first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_line(file, b"a line that does not fit\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_line(file, b"last\n")
    assert file.read_bytes() == b"first\nlast\n"


@pytest.mark.parametrize("make", [*UNWRITABLE, full_disk], ids=[*NAMES, "full-disk"])
def test_a_report_that_cannot_be_written_is_said_once(
    tmp_path: Path, said: list[str], make: Callable[[Path], Path]
) -> None:
    """`FileNotFoundError` ended the engine behind its first answer."""
    path = make(tmp_path)
    for _ in range(3):
        RECORD.append_to(path)
    (line,) = said
    assert f"--kv-report-file {path} cannot be written" in line and "said once" in line


def test_a_record_that_is_no_json_is_said_once(tmp_path: Path, said: list[str]) -> None:
    record = RequestRecord(**vars(RECORD) | {"prompt_tokens": torch.tensor(4)})
    record.append_to(tmp_path / "r.jsonl")
    RECORD.append_to(tmp_path / "r.jsonl")
    assert len(said) == 1
    (line,) = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt_tokens"] == 4


def test_what_cannot_be_counted_ends_no_request(said: list[str]) -> None:
    lab, client = Lab("window", QUOTA, pool_blocks=20), Client("r", 100)
    lab.step({client: 20})
    request = lab.cache.slots.requests["r"]
    # as if a page held tokens that the prompt has not
    lab.pool.positions.fill_(10**6)
    lab.cache.reports.prefilled(request)
    (line,) = said
    assert "what requests keep cannot be counted" in line and "IndexError" in line
