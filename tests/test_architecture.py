"""Who may import whom, how long things may be: read from the source, nothing is imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
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

# the only modules that may import vLLM, and where in them; imports for types alone are free
MAY_IMPORT_VLLM: dict[str, Place] = {
    "attention/*": "module",
    "scheduler/*": "module",
    "worker/worker.py": "module",
    "worker/cpu_worker.py": "module",
    "worker/query_samples.py": "module",
    "testing/*": "module",
    "plugin.py": "function",
    "activation.py": "function",
    "platforms.py": "function",
    "refusals.py": "function",
    "pool_size.py": "function",
    "upstream.py": "function",
}

# imports that cross from one part into another although the rules below forbid it, and why
CROSSINGS = {
    ("worker/worker.py", "scheduler/lookahead.py"): "the id of a look-ahead names its parent",
}


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


def vllm_place(module: str) -> Place | None:
    return next((p for pattern, p in MAY_IMPORT_VLLM.items() if fnmatch(module, pattern)), None)


def imports_vllm(found: Import) -> bool:
    return found.module.split(".")[0] == "vllm"


def part(module: str) -> str:
    return module.split("/")[0]


@pytest.mark.parametrize("module", MODULES)
def test_vllm_is_imported_only_where_it_must_be(module: str) -> None:
    place = vllm_place(module)
    allowed = {"module": ("module", "function", "types"), "function": ("function", "types")}
    wrong = [
        found.line
        for found in imports(module)
        if imports_vllm(found) and found.place not in allowed.get(str(place), ("types",))
    ]
    assert not wrong, f"vllm_budgetkv/{module} imports vLLM in lines {wrong}"


@pytest.mark.parametrize("module", [m for m in MODULES if vllm_place(m) != "module"])
def test_importing_it_does_not_import_vllm_behind_its_back(module: str) -> None:
    reached, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += own_imports(current, "module")
    assert not [m for m in reached if vllm_place(m) == "module"]


def test_the_list_of_exceptions_is_not_longer_than_needed() -> None:
    for pattern in MAY_IMPORT_VLLM:
        assert any(fnmatch(module, pattern) for module in MODULES), pattern
    for module, other in CROSSINGS:
        assert other in own_imports(module, "module", "function"), (module, other)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("policy", "ops"),
        ("policy", "worker"),
        ("policy", "scheduler"),
        ("policy", "attention"),
        ("ops", "policy"),
        ("ops", "worker"),
        ("ops", "scheduler"),
        ("ops", "attention"),
        ("scheduler", "worker"),
        ("scheduler", "attention"),
        ("scheduler", "ops"),
        ("worker", "scheduler"),
    ],
    ids="->".join,
)
def test_parts_do_not_know_each_other(source: str, target: str) -> None:
    crossings = {
        (module, other)
        for module in MODULES
        if part(module) == source
        for other in own_imports(module, "module", "function", "types")
        if part(other) == target
    }
    assert not crossings - CROSSINGS.keys()


def test_arithmetic_imports_nothing_of_ours() -> None:
    allowed = {"spans.py": {"upload.py"}}
    arithmetic = ("quota.py", "layer_budgets.py", "layout.py", "spans.py", "rotation.py")
    for module in (*arithmetic, "option.py"):
        found = own_imports(module, "module", "function", "types")
        assert found == allowed.get(module, set()), module


def test_only_the_compressor_joins_policy_and_ops() -> None:
    joins = {
        module
        for module in MODULES
        if {"policy", "ops"} <= {part(m) for m in own_imports(module, "module", "function")}
    }
    assert joins == {"worker/compressor.py"}


def test_a_reference_calls_no_kernel() -> None:
    for module in MODULES:
        if module.startswith("ops/reference/"):
            used = own_imports(module, "module", "function")
            assert all(m.startswith(("ops/reference/", "layout")) for m in used), (module, used)


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
    is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
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
            assert module == "upstream.py" or called != "setattr", f"{module}:{node.lineno}"
            assert module == "upstream.py" or not called.endswith("import_module"), module


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
    if module == "upstream.py":
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
