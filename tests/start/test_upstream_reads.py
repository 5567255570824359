"""What our code reads of vLLM's objects stands in the table: read from our sources.

Only what is annotated with a class of the table is followed, through the fields in `FIELDS`, local
names, loops, and `self` of our subclasses. What is passed as `Any` is not seen.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_budgetkv.start.upstream import TOUCHPOINTS
from vllm_budgetkv.start.upstream_reads import PLAN_READS, READS

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL_READS = (*READS, *PLAN_READS)
PACKAGE = Path(__file__).parents[2] / "vllm_budgetkv"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# classes of the fields that we go through
FIELDS = {
    ("VllmConfig", "attention_config"): "AttentionConfig",
    ("VllmConfig", "cache_config"): "CacheConfig",
    ("VllmConfig", "compilation_config"): "CompilationConfig",
    ("VllmConfig", "model_config"): "ModelConfig",
    ("VllmConfig", "parallel_config"): "ParallelConfig",
    ("VllmConfig", "scheduler_config"): "SchedulerConfig",
    ("Worker", "vllm_config"): "VllmConfig",
    ("AsyncScheduler", "vllm_config"): "VllmConfig",
    ("AsyncScheduler", "kv_cache_config"): "KVCacheConfig",
    ("AsyncScheduler", "kv_cache_manager"): "KVCacheManager",
    ("KVCacheManager", "coordinator"): "KVCacheCoordinator",
    ("SchedulerOutput", "scheduled_cached_reqs"): "CachedRequestData",
    ("SchedulerOutput", "scheduled_new_reqs"): "NewRequestData",
    ("MultiModalFeatureSpec", "mm_position"): "PlaceholderRange",
}
# our classes read them as their own
BASES = {
    "BudgetScheduler": "AsyncScheduler",
    "BudgetWorker": "Worker",
    "QuotaManager": "FullAttentionManager",
    "QuotaSpec": "FullAttentionSpec",
    "TurnScheduler": "AsyncScheduler",
}
ALIASES = {"VllmPlatform": "Platform", "AttentionSpec": "FullAttentionSpec"}


def listed(cls: str) -> set[str]:
    """Members of a class that the tables know, and those that we override."""
    found = {m.partition("(")[0] for reads in ALL_READS if reads.name == cls for m in reads.members}
    return found | {point.name.split(".")[-1] for point in TOUCHPOINTS}


# a class of ours has the same name
KNOWN = {reads.name for reads in ALL_READS} - {"RequestState"}


def class_in(annotation: ast.expr | None) -> str | None:
    """The class of the table that an annotation names, itself or as what a container holds."""
    names = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
    found = {ALIASES.get(name, name) for name in names} & KNOWN
    return found.pop() if len(found) == 1 and "Callable" not in names else None


class Reader(ast.NodeVisitor):
    """Collects (class, member, line) of what a module reads."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.own: set[str] = set()
        self.found: list[tuple[str, str, int]] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        nodes = list(ast.walk(node))
        self.own = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        self.own |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        for n in nodes:
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
                self.own |= {n.attr} if ast.unparse(n.value) == "self" else set()
        if node.name in BASES:
            self.types["self"] = BASES[node.name]
        self.generic_visit(node)
        self.types.pop("self", None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.types)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self.bind(ast.Name(argument.arg), class_in(argument.annotation))
        for statement in node.body:
            self.visit(statement)
        self.types = outer

    def bind(self, target: ast.expr, cls: str | None) -> None:
        if isinstance(target, ast.Name) and (cls or target.id != "self"):
            self.types.pop(target.id, None)
            if cls:
                self.types[target.id] = cls

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                self.bind(name, self.class_of(value))

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.class_of(node.iter))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        cls = self.class_of(node.value)
        is_own = (
            isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.own
        )
        if cls is not None and not is_own:
            self.found.append((cls, node.attr, node.lineno))
        self.generic_visit(node)

    def class_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            return FIELDS.get((self.class_of(node.value) or "", node.attr))
        return None


def unlisted(source: str) -> Iterator[str]:
    """Members that a module reads and the tables do not know."""
    reader = Reader()
    reader.visit(ast.parse(source))
    for cls, member, line in reader.found:
        if member not in listed(cls):
            yield f"line {line}: {cls}.{member}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_read_is_in_the_table(module: str) -> None:
    assert list(unlisted((PACKAGE / module).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(r: Request): return r.mood", "line 1: Request.mood"),
        ("def f(r: Request | None): return r.request_id", None),
        ("def f(c: VllmConfig):\n  m, p = c.model_config, 1\n  m.mood", "line 3: ModelConfig.mood"),
        ("def f(c: VllmConfig): c.cache_config.mood", "line 1: CacheConfig.mood"),
        ("def f(all: list[Request]):\n  for r in all: r.mood", "line 2: Request.mood"),
        ("def f(r: Request):\n  r = 1\n  r.mood", None),
        ("class BudgetWorker(Worker):\n  def f(self): self.mood", "line 2: Worker.mood"),
        ("class BudgetWorker(Worker):\n  def f(self): self.mood = 1; self.mood", None),
        ("class Other:\n  def f(self): self.mood", None),
    ],
)
def test_a_read_that_is_not_listed_is_found(source: str, found: str | None) -> None:
    assert list(unlisted(source)) == ([found] if found else [])


def test_the_table_lists_nothing_that_is_gone() -> None:
    """Each member is a word of the sources, but for the table itself."""
    text = "".join(
        (PACKAGE / module).read_text(encoding="utf-8")
        for module in MODULES
        if module != "start/upstream_reads.py"
    )
    words = set(re.findall(r"\w+", text))
    members = {m.partition("(")[0] for reads in ALL_READS for m in reads.members}
    assert members - {""} <= words
