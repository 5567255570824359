"""Folders that are written once and then used by all processes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = "config.json"


def made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder of a model; written if it is not there or not whole.

    Processes may ask at once: each writes a draft of its own, and the first that is done has it.

    Args:
        folder: where it shall be.
        write: writes its files, `WHOLE` among them, to a folder that is given.
    """
    if (folder / WHOLE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        write(draft)
        if not (folder / WHOLE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    except OSError:
        # another process was done in between
        if not (folder / WHOLE).is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
