"""What vLLM's sources say of every class that the plugin touches, without installing vLLM.

    python -m tools.vllm_extract vllm-0.33.0.tar.gz > tests/start/vllm_versions/0.33.json

A source distribution is read with `ast`: the classes and functions named in
`vllm_budgetkv/start/upstream.py` and `upstream_reads.py`, each class with all that it inherits
inside vLLM. All members are kept, not only those that we use today, so that a new row of the tables
seldom needs the source distribution again. `tests/start/test_upstream_versions.py` compares.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_budgetkv.start.upstream import TOUCHPOINTS
from vllm_budgetkv.start.upstream_reads import PLAN_READS, READS

if TYPE_CHECKING:
    from collections.abc import Iterator

Functions = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Sources:
    """vLLM's modules, parsed when they are asked for.

    Args:
        texts: source of each module, by its dotted name.
    """

    texts: dict[str, str]
    trees: dict[str, list[ast.stmt]] = field(default_factory=dict)

    @classmethod
    def of(cls, sdist: Path) -> Sources:
        texts = {}
        with tarfile.open(sdist) as archive:
            for entry in archive:
                # vllm-0.33.0/vllm/config/__init__.py
                path = entry.name.partition("/")[2]
                if path.startswith("vllm/") and path.endswith(".py"):
                    file = archive.extractfile(entry)
                    assert file is not None
                    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                    texts[module] = file.read().decode()
        return cls(texts)

    def statements(self, module: str) -> list[ast.stmt]:
        """Statements of a module; those under an `if` or `try` stand among the others."""
        if module not in self.trees:
            self.trees[module] = list(_flat(ast.parse(self.texts[module]).body))
        return self.trees[module]

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef | Functions] | None:
        """The class or function that `name` means in a module, and the module that defines it."""
        for statement in self.statements(module):
            if isinstance(statement, ast.ClassDef | Functions) and statement.name == name:
                return module, statement
        for statement in self.statements(module):
            if not isinstance(statement, ast.ImportFrom):
                continue
            for alias in statement.names:
                source = self._absolute(module, statement)
                if (alias.asname or alias.name) == name and source in self.texts:
                    return self.find(source, alias.name)
        return None

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        is_package = any(other.startswith(module + ".") for other in self.texts)
        parts = module.split(".")
        kept = parts[: len(parts) - statement.level + is_package]
        return ".".join([*kept, *([statement.module] if statement.module else [])])

    def members(self, module: str, node: ast.ClassDef) -> dict[str, str]:
        """Members of a class and, behind them, of its bases inside vLLM, as the extract has them.

        A field is its name; a method has its parameters behind it, see `signature_of`.
        """
        found = dict(_own_members(node))
        for base in node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            known = self.find(module, ast.unparse(expression))
            if known is not None and isinstance(known[1], ast.ClassDef):
                found = self.members(known[0], known[1]) | found
        return found


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        if isinstance(statement, ast.If | ast.Try):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)
        else:
            yield statement


def _own_members(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    # what a method sets on `self` first: a property of that name says no more
    for statement in _flat(node.body):
        if isinstance(statement, Functions):
            yield from ((name, name) for name in _set_on_self(statement))
    for statement in _flat(node.body):
        if isinstance(statement, Functions):
            name = statement.name
            decorators = [ast.unparse(decorator) for decorator in statement.decorator_list]
            is_property = any("property" in d or d.endswith(".setter") for d in decorators)
            yield name, name if is_property else name + signature_of(statement)
        elif isinstance(statement, ast.AnnAssign):
            yield ast.unparse(statement.target), ast.unparse(statement.target)
        elif isinstance(statement, ast.Assign):
            yield from ((ast.unparse(target), ast.unparse(target)) for target in statement.targets)


def _set_on_self(function: Functions) -> Iterator[str]:
    # an annotation without a value sets nothing
    bare = {
        id(node.target)
        for node in ast.walk(function)
        if isinstance(node, ast.AnnAssign) and node.value is None
    }
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
            and id(node) not in bare
        ):
            yield node.attr


def signature_of(function: Functions) -> str:
    """`(name, optional=, *args, only_by_name, **kwargs)`."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    found = [a.arg + "=" * (index >= num_required) for index, a in enumerate(positional)]
    if arguments.vararg:
        found.append(f"*{arguments.vararg.arg}")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(argument.arg + "=" * (default is not None))
    if arguments.kwarg:
        found.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(found)})"


def extract(sources: Sources) -> dict[str, list[str] | str]:
    """Members of every class, and parameters of every function, that the tables name.

    A name that the sources do not have is left out.
    """
    places = {(point.module, point.name.split(".")[0]) for point in TOUCHPOINTS}
    places |= {(reads.module, reads.name) for reads in (*READS, *PLAN_READS)}
    found: dict[str, list[str] | str] = {}
    for module, name in sorted(places):
        known = sources.find(module, name) if module in sources.texts else None
        if known is None:
            continue
        defined_in, node = known
        if isinstance(node, ast.ClassDef):
            found[f"{module}.{name}"] = sorted(sources.members(defined_in, node).values())
        else:
            found[f"{module}.{name}"] = name + signature_of(node)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sdist", type=Path, help="vllm-VERSION.tar.gz, as PyPI has it")
    sdist = parser.parse_args().sdist
    version = sdist.name.removeprefix("vllm-").removesuffix(".tar.gz")
    sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
    found = {"vllm": version, "sdist_sha256": sha256, "symbols": extract(Sources.of(sdist))}
    # one member per line, so that a diff of two versions shows what changed
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
