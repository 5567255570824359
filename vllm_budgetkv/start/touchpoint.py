"""One vLLM symbol that we wrap, subclass, register or read, and how it is found."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Touchpoint:
    """One vLLM symbol.

    Args:
        module: module that defines it.
        name: dotted name inside the module.
        how: wrap, subclass, register, override, replace (in one object) or read.
        why: what we need it for.
        parameters: the parameters it must have, in order, and "..." behind them where any others
            are passed on unseen; None when only its presence counts.
        device: the one kind of device that imports it, or None for all. vLLM's worker for CPUs
            replaces functions of `torch.cuda` for the whole process as it is imported.
    """

    module: str
    name: str
    how: str
    why: str
    parameters: tuple[str, ...] | None = None
    device: str | None = None

    @property
    def place(self) -> str:
        return f"{self.module}.{self.name}"

    def resolve(self) -> Any:
        return resolve(self.module, self.name)

    def fits(self, found: Sequence[str]) -> bool:
        """Whether a function with these parameters is the one that we know."""
        known = self.parameters or ()
        if known[-1:] == ("...",):
            return tuple(found[: len(known) - 1]) == known[:-1]
        return tuple(found) == known

    def problem(self) -> str | None:
        """What differs from the vLLM that this table was written for; None if nothing does."""
        try:
            target = self.resolve()
        except (ImportError, AttributeError) as error:
            return f"{self.place}: missing ({error})"
        if self.parameters is None:
            return None
        function = target.__func__ if isinstance(target, classmethod | staticmethod) else target
        found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if self.fits(found):
            return None
        return f"{self.place}: takes {found}, expected {self.parameters}"


def resolve(module: str, name: str) -> Any:
    """The symbol itself; of a class or static method what its class holds."""
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = inspect.getattr_static(target, part)
    return target
