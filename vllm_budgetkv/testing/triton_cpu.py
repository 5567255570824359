"""Lets vLLM's Model Runner V2 and Triton kernels run on a CPU, under Triton's interpreter.

vLLM switches Triton off on a CPU unless `triton.backends` knows a backend called "cpu", and without
Triton it takes the V1 model runner. Under TRITON_INTERPRET=1 no backend is ever asked to compile,
so a name is enough: `install` adds one whose driver says that it is not active.

It has to be there before vLLM is imported, in the engine's own processes too. So a test starts a
process with

    subprocess.run([sys.executable, ...], env=os.environ | triton_cpu.environment())

which puts `triton_cpu_site/`, a folder with a `sitecustomize` module, on PYTHONPATH. Children
inherit it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SITE = Path(__file__).parent / "triton_cpu_site"
BACKENDS = "triton.backends"


def environment() -> dict[str, str]:
    """Variables with which a new Python process and its children run Model Runner V2 on a CPU."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([str(SITE), *([inherited] if inherited else [])]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


def install() -> None:
    """Adds the backend "cpu" as soon as `triton.backends` is imported; imports nothing itself.

    Raises:
        RuntimeError: vLLM has been imported and has made up its mind about Triton.
    """
    if "vllm.triton_utils" in sys.modules:
        raise RuntimeError("triton_cpu.install() came after vLLM was imported; call it first")
    if BACKENDS in sys.modules:
        _add_backend(sys.modules[BACKENDS])
    else:
        sys.meta_path.insert(0, _BackendsHook())


class _BackendsHook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `triton.backends` with its own loader, once, and then adds the backend."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != BACKENDS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add_backend(module)


def _add_backend(module: ModuleType) -> None:
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        """Stands for "no device": Triton picks another driver if there is one."""

        @classmethod
        def is_active(cls) -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise _not_compiled()

        def get_current_target(self) -> Any:
            raise _not_compiled()

        def get_active_torch_device(self) -> Any:
            raise _not_compiled()

        def get_benchmarker(self) -> Any:
            raise _not_compiled()

    # Triton looks compilers up by the target of the active driver, and this one never is
    module.backends.setdefault(
        "cpu", module.Backend(compiler=BaseBackend, driver=InterpreterDriver)
    )


def _not_compiled() -> RuntimeError:
    return RuntimeError(
        "Triton was asked to compile for the CPU; kernels run here under TRITON_INTERPRET=1 only"
    )
