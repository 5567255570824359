"""What is published holds what it needs; `make dist` compiles, installs and serves it too."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_budgetkv"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def copied(target: Path) -> None:
    """What the first stage of the Dockerfile copies, copied."""
    stage = DOCKERFILE.partition("WORKDIR /source")[2].partition("\nFROM")[0]
    for words in re.findall(r"^COPY (.+)$", stage, re.MULTILINE):
        *sources, place = shlex.split(words)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    target / place,
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"),
                )
            else:
                shutil.copy(ROOT / source, target / source)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the Dockerfile's own command builds of what it copied, without compiling."""
    folder = tmp_path_factory.mktemp("docker")
    source = folder / "source"
    source.mkdir()
    copied(source)
    (command,) = re.findall(r"python3 (-m pip wheel .+?)$", DOCKERFILE, re.MULTILINE)
    words = [str(folder) if word == "/wheels" else word for word in shlex.split(command)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=source,
        env=os.environ | {"BUDGETKV_NO_EXT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return zipfile.ZipFile(found)


def test_the_wheel_has_every_module_and_what_they_read(wheel: zipfile.ZipFile) -> None:
    kinds = ("*.py", "*.html", "*.css", "py.typed")
    ours = {path.relative_to(ROOT).as_posix() for kind in kinds for path in PACKAGE.rglob(kind)}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == ours


def test_vllm_finds_the_plugin_and_a_shell_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(name).decode()
    assert "[vllm.general_plugins]\nbudgetkv = vllm_budgetkv:register" in text
    assert "vllm-budgetkv = vllm_budgetkv.cli.main:main" in text


def test_the_wheel_asks_for_no_vllm_and_no_torch(wheel: zipfile.ZipFile) -> None:
    """It must not replace what is installed."""
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", wheel.read(name).decode(), re.M)
    assert required and not {"vllm", "torch", "triton", "ray"} & set(required)
