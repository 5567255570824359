"""Folders that several processes may want at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.real.made import WHOLE, made_once

if TYPE_CHECKING:
    from pathlib import Path


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / WHOLE).write_text(text, encoding="utf-8")


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("first", "second"):
        assert made_once(folder, lambda draft, text=text: fill(draft, text)) == folder
    assert (folder / WHOLE).read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_the_first_that_is_done_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def write_slowly(draft: Path) -> None:
        fill(folder, "another process")
        fill(draft, "this one")

    made_once(folder, write_slowly)
    assert (folder / WHOLE).read_text(encoding="utf-8") == "another process"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").touch()
        raise OSError("no package")

    with pytest.raises(OSError, match="no package"):
        made_once(tmp_path / "model", fail)
    assert not list(tmp_path.iterdir())
