"""Compiles Triton kernels for GPUs that are not there, as their launchers would call them.

`record` runs launchers on CPU tensors and notes what they launch; `compile_for` makes a cubin of
one launch and reads what it uses. What the kernels compute is tested under the interpreter.
"""

from __future__ import annotations

import inspect
import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Iterator

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WARP_SIZE = 32
OPTIONS = ("num_warps", "num_stages")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments as bound to its parameters, and its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel takes; `stack_bytes` per thread are spills."""

    registers: int
    shared_bytes: int
    stack_bytes: int


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects the launches of the block instead of running them."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
        launches.append(Launch(kernel, dict(bound.arguments), options, grid))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def compile_for(launch: Launch, capability: int) -> Usage:
    """Compile one launch for a compute capability such as 90.

    Raises:
        Exception: whatever Triton raises where the kernel does not compile.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[param.name] = _describe(value, (index,), constants, attributes)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, WARP_SIZE)
    compiled = triton.compile(source, target=target, options=launch.options)
    return _read_usage(compiled)


def _describe(
    value: Any,
    path: tuple[int, ...],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    """The type of an argument, specialised as Triton does at a launch: 1, multiples of 16."""
    if isinstance(value, tuple):
        types = [_describe(v, (*path, i), constants, attributes) for i, v in enumerate(value)]
        return type(value)(*types)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def _read_usage(compiled: Any) -> Usage:
    cubin = Path(compiled.metadata_group[f"{compiled.metadata.name}.cubin"])
    command = [CUOBJDUMP, "-res-usage", cubin]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return Usage(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])
