"""Which kernels there are, for what, and which of them this machine takes."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vllm_budgetkv
from vllm_budgetkv import ops
from vllm_budgetkv.cli.device import device_of_vllm
from vllm_budgetkv.cli.findings import Finding, State
from vllm_budgetkv.ops import backend, extension

if TYPE_CHECKING:
    from collections.abc import Iterator

# copies of each CPU kernel, the best first, as `csrc/isa.cpp` names them
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "generic")
BUILD = "build them again: pip install . --no-build-isolation"
ISA_VARIABLE = "VLLM_BUDGETKV_ISA"


def findings() -> Iterator[Finding]:
    """The backend that the environment asks for, the compiled kernels and Triton."""
    device = device_of_vllm()
    yield _chosen()
    yield from _extension(is_needed=device != "cuda" and _asks_kernels())
    yield _triton(is_needed=device == "cuda")


def op_names() -> list[str]:
    """Names of all ops."""
    return sorted(name for name in ops.__all__ if name.islower())


def _asks_kernels() -> bool:
    return os.environ.get(backend.BACKEND_VARIABLE, "kernels") == "kernels"


def _chosen() -> Finding:
    variable = backend.BACKEND_VARIABLE
    try:
        found = backend.of(torch.empty(0))
    except (ValueError, RuntimeError) as error:
        return Finding(variable, State.WRONG, str(error), f"unset {variable}")
    if _asks_kernels():
        return Finding(variable, State.OK, "unset: C++ on CPUs, Triton on GPUs")
    told = f"every op runs as {found}, which is slow and for tests"
    return Finding(variable, State.NOTE, told, f"unset {variable}")


def _extension(is_needed: bool) -> Iterator[Finding]:
    name = "kernels for CPUs"
    state = State.WRONG if is_needed else State.NOTE
    try:
        extension.load()
    except ImportError as error:
        told, _, to_do = str(error).partition(": ")
        yield Finding(name, state, told, to_do)
        return
    except OSError as error:
        told = f"cannot be loaded, built for another torch than {torch.__version__}? {error}"
        yield Finding(name, state, told, BUILD)
        return
    missing = [op for op in op_names() if not _is_compiled(op)]
    if missing:
        told = f"older than the package: {', '.join(missing)} are missing"
        yield Finding(name, state, told, BUILD)
        return
    yield _origin(name)
    yield _instruction_set(state)


def _origin(name: str) -> Finding:
    """Which file was loaded; a second copy of the package finds that of an editable one."""
    found = find_spec("vllm_budgetkv._C")
    assert found is not None and found.origin is not None
    folder = Path(vllm_budgetkv.__file__).parent
    told = f"{len(op_names())} ops in C++, {found.origin}: {', '.join(op_names())}"
    if Path(found.origin).parent == folder:
        return Finding(name, State.OK, told)
    return Finding(name, State.NOTE, f"{told}; not those of {folder}", BUILD)


def _is_compiled(op: str) -> bool:
    """Whether C++ has a kernel of this op for CPUs."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"budgetkv::{op}", "CPU")
    except RuntimeError:
        # no such operator at all
        return False


def _instruction_set(state: State) -> Finding:
    """The copy that this CPU takes. Each is tried, and the one that was in use put back."""
    name = "instruction set"
    try:
        taken = str(torch.ops.budgetkv.get_isa())
    except (ValueError, RuntimeError) as error:
        told = str(error).splitlines()[0]
        return Finding(name, state, f"{ISA_VARIABLE}: {told}", f"unset {ISA_VARIABLE}")
    able = [isa for isa in INSTRUCTION_SETS if _can_run(isa)]
    torch.ops.budgetkv.set_isa(taken)
    told = f"{taken}; kernels know {', '.join(INSTRUCTION_SETS)}, this CPU runs {', '.join(able)}"
    if taken != able[0]:
        told += f"; {able[0]} would be faster"
        return Finding(name, State.NOTE, told, f"unset {ISA_VARIABLE}")
    return Finding(name, State.OK, told)


def _can_run(isa: str) -> bool:
    try:
        torch.ops.budgetkv.set_isa(isa)
    except (ValueError, RuntimeError):
        return False
    return True


def _triton(is_needed: bool) -> Finding:
    name = "kernels for GPUs"
    told = f"{len(op_names())} ops in Triton, compiled when a GPU first runs them"
    try:
        return Finding(name, State.OK, f"{told}; Triton {version('triton')}")
    except PackageNotFoundError:
        missing = f"{told}; Triton is not installed"
    if is_needed:
        return Finding(name, State.WRONG, missing, "install the Triton of your torch")
    return Finding(name, State.OK, f"{missing}, and not needed here")
