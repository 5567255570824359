"""Files of reports and traces: tried at start, and appended to without waiting for anyone."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# a pipe that no one reads is an error then, instead of a wait without an end
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
NEW_FILE_MODE = 0o666


def check_report_file(path: str | Path, flag: str = "--kv-report-file") -> None:
    """Open the file as reports will; it is created if it is not there.

    Args:
        path: of the file.
        flag: that names it.

    Raises:
        ValueError: nothing can be appended to it.
    """
    try:
        os.close(os.open(path, FLAGS, NEW_FILE_MODE))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {path} cannot be written ({error}): name a file in a directory "
            "that exists and may be written to"
        ) from error


def append_line(path: str | Path, line: bytes) -> None:
    """Append the whole line or nothing of it.

    Raises:
        OSError: the file cannot be written.
    """
    file = os.open(path, FLAGS, NEW_FILE_MODE)
    try:
        size_bytes = os.fstat(file).st_size
        try:
            while line:
                line = line[os.write(file, line) :]
        except OSError:
            # half a line would spoil the next one too; what is no real file has no size to restore
            with contextlib.suppress(OSError):
                os.ftruncate(file, size_bytes)
            raise
    finally:
        os.close(file)
