"""Where a result comes from: model, commit and machine, as every results file names them."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

REPOSITORY = Path(__file__).parents[2]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a script as they can be committed, and what they were run on."""
    given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    return given | {
        "model": model_name(options.model),
        "commit": current_commit(),
        "machine": machine(),
    }


def model_name(model: str) -> str:
    """The model as a user would name it, from the repository's root."""
    path = Path(model)
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else model


@cache
def current_commit() -> str:
    """Short hash of the commit, with a plus if the working tree differs from it.

    Asked once in a process, so that the results it writes do not count as a difference.
    """
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = cpuinfo.split("model name")[1].splitlines()[0].strip(" :\t")
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"
