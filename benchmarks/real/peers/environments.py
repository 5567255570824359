"""Environments of the peers in `build/real/peers`, from pinned requirements; their processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.provenance import REPOSITORY
from benchmarks.real.packages import FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
ENVIRONMENTS = FOLDER / "peers"
# the engine's own; a local build for CPUs or the index's
TORCH = "torch==2.13.0"
EXPORTED = ENVIRONMENTS / "smollm2-135m-openvino"
PROCESS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}


def requirements(peer: str) -> Path:
    return HERE / f"requirements-{peer}.txt"


def versions(peer: str) -> dict[str, str]:
    """Pinned versions of the packages that a reader asks for."""
    pins = dict(
        line.split("==") for line in requirements(peer).read_text().splitlines() if "==" in line
    )
    named = ("kvpress", "openvino-genai", "optimum-intel", "transformers")
    return {name: pins[name] for name in named if name in pins}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; made the first time and when its pins change.

    Raises:
        OSError: pip cannot fetch what is pinned.
    """
    folder = ENVIRONMENTS / peer
    python, stamp = folder / "bin" / "python", folder / ".pins"
    pins = TORCH + requirements(peer).read_text(encoding="utf-8")
    digest = hashlib.sha256(pins.encode()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == digest):
        logger.info("making the environment of %s, some minutes", peer)
        venv.create(folder, with_pip=True, clear=True)
        # torch first and the rest without dependencies: none may bring another torch
        install(python, TORCH)
        install(python, "--no-deps", "--requirement", str(requirements(peer)))
        stamp.write_text(digest)
    return python


def install(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-1000:]}")


def exported_model(model: str) -> Path:
    """The model as OpenVINO reads it, in float32; exported the first time.

    Raises:
        RuntimeError: the exporter failed.
    """
    if not (EXPORTED / "openvino_model.xml").is_file():
        logger.info("exporting the model to OpenVINO")
        draft = EXPORTED.with_suffix(".draft")
        exporter = python_of("openvino").with_name("optimum-cli")
        command = [str(exporter), "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(draft)]
        done = subprocess.run(
            command, env=os.environ | PROCESS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        draft.rename(EXPORTED)
    return EXPORTED


def ask_process(
    python: Path | str, module: str, job: Mapping[str, Any], threads: int, **environment: str
) -> Any:
    """Run a module of this package as a process, with a job on stdin.

    Returns:
        the last line that it printed, as JSON.

    Raises:
        RuntimeError: it failed; with the end of its errors.
    """
    command: Sequence[str] = [str(python), "-m", f"benchmarks.real.peers.{module}"]
    done = subprocess.run(
        command,
        input=json.dumps(dict(job) | {"threads": threads}),
        env=os.environ | PROCESS | {"OMP_NUM_THREADS": str(threads)} | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
