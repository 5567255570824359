"""Who may import whom, how long things may be: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_budgetkv"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50

HOST_TENSORS = {"torch.tensor", "torch.as_tensor", "torch.asarray"}

Place = Literal["module", "function", "types"]
DOCUMENT = ROOT / "docs" / "architecture.md"
VLLM_PLACES: dict[str, tuple[Place, ...]] = {
    "anywhere": ("module", "function", "types"),
    "in functions": ("function", "types"),
    "for types": ("types",),
}


@dataclass(frozen=True)
class Part:
    """A row of the document's table: a folder or file of the package.

    `imports` are the parts that it may import, `vllm` the places where it may import vLLM.
    """

    name: str
    imports: frozenset[str]
    vllm: tuple[Place, ...]


def read_parts() -> dict[str, Part]:
    """The table of `docs/architecture.md`, from the top."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.partition("<!-- imports:start -->")[2].partition("<!-- imports:stop -->")[0]
    parts = {}
    for line in table.strip().splitlines()[2:]:
        name, imported, vllm = (cell.strip() for cell in line.strip("|").split("|"))
        name = name.strip("`")
        parts[name] = Part(name, frozenset(re.findall(r"`([^`]+)`", imported)), VLLM_PLACES[vllm])
    return parts


PARTS = read_parts()


@dataclass(frozen=True)
class Import:
    """`module` is dotted; `place` says when it is imported."""

    module: str
    place: Place
    line: int


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports(tree(module), "module"))


def _imports(node: ast.AST, place: Place) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, place, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            assert child.module
            yield Import(child.module, place, child.lineno)
            # `from package import module` names a module too
            names = (f"{child.module}.{alias.name}" for alias in child.names)
            yield from (Import(name, place, child.lineno) for name in names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports(child, "types")
        elif isinstance(child, ast.FunctionDef | ast.Lambda):
            yield from _imports(child, "types" if place == "types" else "function")
        else:
            yield from _imports(child, place)


@cache
def own_imports(module: str, *places: Place) -> frozenset[str]:
    """Modules of ours that `module` imports in one of `places`."""
    found = {i.module for i in imports(module) if i.place in places}
    paths = {name.replace(".", "/") for name in found}
    return frozenset(
        other
        for other in MODULES
        if f"vllm_budgetkv/{other.removesuffix('.py').removesuffix('/__init__')}" in paths
        or (other == "__init__.py" and "vllm_budgetkv" in paths)
    )


def part(module: str) -> str:
    return module.split("/")[0]


def imports_vllm(found: Import) -> bool:
    return found.module.split(".")[0] == "vllm"


def test_the_table_names_every_part_and_no_other() -> None:
    assert {part(module) for module in MODULES} - {"__init__.py"} == set(PARTS)


def test_no_part_imports_one_below_it() -> None:
    above: set[str] = set()
    for found in PARTS.values():
        assert found.imports <= above, f"{found.name} imports {found.imports - above} below it"
        above.add(found.name)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__.py"])
def test_a_module_imports_what_its_part_may(module: str) -> None:
    allowed = PARTS[part(module)].imports | {part(module), "__init__.py"}
    found = {part(other) for other in own_imports(module, "module", "function", "types")}
    assert found <= allowed, f"vllm_budgetkv/{module} imports {found - allowed}"


@pytest.mark.parametrize("name", PARTS)
def test_the_table_allows_no_more_than_is_used(name: str) -> None:
    used = {
        part(other)
        for module in MODULES
        if part(module) == name
        for other in own_imports(module, "module", "function", "types")
    }
    assert PARTS[name].imports <= used


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__.py"])
def test_vllm_is_imported_only_where_its_part_may(module: str) -> None:
    allowed = PARTS[part(module)].vllm
    wrong = [i.line for i in imports(module) if imports_vllm(i) and i.place not in allowed]
    assert not wrong, f"vllm_budgetkv/{module} imports vLLM in lines {wrong}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also for types: a circle is two rooms with one purpose."""
    sorter = TopologicalSorter(
        {
            module: own_imports(module, "module", "function", "types") - {module}
            for module in MODULES
            if not module.endswith("__init__.py")
        }
    )
    sorter.prepare()


def test_functions_take_few_arguments() -> None:
    """More than seven in less than one of a hundred functions; kernels are not counted."""
    long, count = [], 0
    for module in MODULES:
        if module.startswith(("ops/triton/", "testing/")):
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [argument.arg for argument in arguments]
                count += 1
                if len([name for name in names if name not in ("self", "cls")]) > 7:
                    long.append(f"{module}: {node.name}")
    assert len(long) < count / 100, long


def test_only_the_compressor_joins_policy_and_ops() -> None:
    joins = {
        module
        for module in MODULES
        if {"policy", "ops"} <= {part(m) for m in own_imports(module, "module", "function")}
    }
    assert joins == {"cache/compressor.py"}


def test_a_reference_calls_no_kernel() -> None:
    for module in MODULES:
        if module.startswith("ops/reference/"):
            used = own_imports(module, "module", "function")
            assert all(m.startswith(("ops/reference/", "arithmetic/")) for m in used), (
                module,
                used,
            )


@pytest.mark.parametrize("pattern", ["vllm_budgetkv/**/*.py", "csrc/*", "tests/**/*.py"])
def test_files_are_short(pattern: str) -> None:
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob(pattern)}
    assert lines
    assert not {p: n for p, n in lines.items() if n > MAX_FILE_LINES}


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_a_screen(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            lines = _code_lines(node)
            assert lines <= MAX_FUNCTION_LINES, f"{module}: {node.name} has {lines} lines"


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring; of a Triton kernel without its parameters too."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    is_kernel = any(decorator.startswith("triton.jit") for decorator in decorators)
    first_line = function.body[0].lineno if is_kernel else function.lineno
    lines = (function.end_lineno or 0) - first_line + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_habits(module: str) -> None:
    assert "utils" not in Path(module).stem, "a file is named after what is in it"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}: bare except"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert part(module) == "testing" or called != "print", f"{module}:{node.lineno}"
            assert module == "start/upstream.py" or called != "setattr", f"{module}:{node.lineno}"
            names_vllm = module in ("start/upstream.py", "start/touchpoint.py")
            assert names_vllm or not called.endswith("import_module"), module


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "testing"])
def test_numbers_reach_a_device_without_waiting_for_it(module: str) -> None:
    """`torch.tensor(..., device=...)` waits for a GPU until all that was launched has run."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in HOST_TENSORS:
            moved = any(keyword.arg == "device" for keyword in node.keywords)
            assert not moved, f"{module}:{node.lineno}: use upload"


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "testing"])
def test_only_upstream_changes_what_vllm_owns(module: str) -> None:
    """No assignment to an attribute of a module or class that came from vLLM."""
    if module == "start/upstream.py":
        return
    names = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (getattr(node, "module", None) or node.names[0].name).split(".")[0] == "vllm"
        for alias in node.names
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                owner = ast.unparse(target).split(".")
                assert len(owner) == 1 or owner[0] not in names, f"{module}:{node.lineno}"


@cache
def private_names() -> set[str]:
    """What our modules, classes and objects keep to themselves."""
    found = set()
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def patched_names(source: ast.Module) -> Iterator[str]:
    """Names that a test assigns to an object of others, or lets pytest patch."""
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) != "self":
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setattr"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_no_test_patches_a_private_name(path: Path) -> None:
    names = [str(name) for name in patched_names(ast.parse(path.read_text(encoding="utf-8")))]
    assert not {name.rpartition(".")[2] for name in names} & private_names()
