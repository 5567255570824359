"""Lets `import torchvision` succeed where its extension cannot load beside a CPU-only torch.

Loaded at every interpreter start through `torchvision_mend.pth`, because vLLM imports torchvision
in processes that it spawns itself. It costs one entry in `sys.meta_path`: torch is imported only
when somebody imports torchvision.

Without the extension, `torchvision/_meta_registrations.py` fails on `operator torchvision::nms does
not exist`. The two schemas below are all that it needs; an actual call still raises, since no
kernel is registered.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path

BOX_FILTER = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
SCHEMAS = ("nms", "qnms")

# a torch.library.Library takes its registrations along when it is collected
_libraries: list[object] = []


class TorchvisionMend(MetaPathFinder):
    """Runs once, before the first import of torchvision, and then removes itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None:
            declare_missing_operators(Path(spec.origin).parent)
        return None


def declare_missing_operators(package: Path) -> None:
    """Declares `SCHEMAS` unless the extension of the torchvision in `package` loads."""
    import torch

    if extension_loads(package):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema + BOX_FILTER)
    _libraries.append(library)


def extension_loads(package: Path) -> bool:
    """True when `_C` of the torchvision in `package` links against the installed torch."""
    import torch

    candidates = [package / f"_C{suffix}" for suffix in (*EXTENSION_SUFFIXES, ".so")]
    present = [candidate for candidate in candidates if candidate.is_file()]
    if not present:
        return False
    try:
        torch.ops.load_library(str(present[0]))
    except OSError:
        return False
    return True


sys.meta_path.insert(0, TorchvisionMend())
