"""Both tables fit every supported vLLM, installed or not: `tools/vllm_extract.py` read them."""

from __future__ import annotations

import copy
import inspect
import io
import json
import tarfile
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
import vllm

from tools.vllm_extract import Sources
from vllm_budgetkv.start.touchpoint import Touchpoint, resolve
from vllm_budgetkv.start.upstream import SUPPORTED_MINORS, TOUCHPOINTS, minor_of
from vllm_budgetkv.start.upstream_reads import (
    PLAN_READS,
    READS,
    Reads,
    call_problem,
    has_member,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = Path(__file__).parent / "vllm_versions"
EXTRACTS = {
    minor: json.loads((VERSIONS / f"{minor}.json").read_text(encoding="utf-8"))
    for minor in SUPPORTED_MINORS
}
HINT = "read what changed, or make the extract again: python -m tools.vllm_extract SDIST"


def parameters_of(member: str) -> list[str] | None:
    """Parameters of a member of an extract, a default as `name=`; None if it is a field."""
    _, is_call, rest = member.partition("(")
    return [p for p in rest.removesuffix(")").split(", ") if p] if is_call else None


def members_in(symbols: dict[str, Any], place: str) -> dict[str, str] | None:
    """Members of a class of an extract by name; a function is its own only member."""
    found = symbols.get(place)
    if found is None:
        return None
    members = [found] if isinstance(found, str) else found
    return {member.partition("(")[0]: member for member in members}


def problem_of(point: Touchpoint, symbols: dict[str, Any]) -> str | None:
    owner, _, name = point.name.partition(".")
    members = members_in(symbols, f"{point.module}.{owner}")
    if members is None:
        return f"{point.place}: missing"
    if point.name in members or name:
        member = members.get(name or owner)
        if member is None:
            return f"{point.place}: missing"
        found = [p.strip("=*") for p in parameters_of(member) or ()]
        if point.parameters is not None and not point.fits(found):
            return f"{point.place}: takes {found}"
    return None


def problems_of(reads: Reads, symbols: dict[str, Any]) -> Iterator[str]:
    members = members_in(symbols, reads.place)
    if members is None:
        yield f"{reads.place}: missing"
        return
    for name in reads.fields():
        if name not in members:
            yield f"{reads.place}.{name}: missing"
    for name, passed in reads.calls():
        parameters = parameters_of(members.get(name, ""))
        if parameters is None:
            yield f"{reads.place}.{name}: missing"
        elif wrong := call_problem(passed, {p.strip("=*"): p.isidentifier() for p in parameters}):
            yield f"{reads.place}.{name}: {wrong}"


@pytest.mark.parametrize("minor", SUPPORTED_MINORS)
def test_the_extract_is_of_that_version(minor: str) -> None:
    assert minor_of(EXTRACTS[minor]["vllm"]) == minor
    assert len(EXTRACTS[minor]["sdist_sha256"]) == 64


@pytest.mark.parametrize("minor", SUPPORTED_MINORS)
@pytest.mark.parametrize("point", TOUCHPOINTS, ids=lambda point: point.place)
def test_every_symbol_fits(minor: str, point: Touchpoint) -> None:
    assert problem_of(point, EXTRACTS[minor]["symbols"]) is None, HINT


@pytest.mark.parametrize("minor", SUPPORTED_MINORS)
@pytest.mark.parametrize("reads", (*READS, *PLAN_READS), ids=lambda reads: reads.place)
def test_every_member_that_is_read_is_there(minor: str, reads: Reads) -> None:
    assert list(problems_of(reads, EXTRACTS[minor]["symbols"])) == [], HINT


REQUEST = "vllm.v1.request.Request"
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.mark.parametrize(
    ("place", "old", "new", "problem"),
    [
        (REQUEST, "mm_features", None, f"{REQUEST}.mm_features: missing"),
        (REQUEST, "client_index=", "client=", f"{REQUEST}.__init__: takes no client_index"),
        (REQUEST, "client_index=", "client_index=, team", f"{REQUEST}.__init__: wants team too"),
        (SCHEDULER, "add_request(self, request)", None, f"{SCHEDULER}.add_request: missing"),
        (
            SCHEDULER,
            "add_request(self, request)",
            "add_request(self, request, urgency=)",
            f"{SCHEDULER}.add_request: takes ['self', 'request', 'urgency']",
        ),
    ],
)
def test_a_change_is_seen(place: str, old: str, new: str | None, problem: str) -> None:
    symbols = copy.deepcopy(EXTRACTS["0.33"]["symbols"])
    before = symbols[place]
    if new is None:
        symbols[place] = [member for member in before if member != old]
    else:
        symbols[place] = [member.replace(old, new) for member in before]
    assert symbols[place] != before
    found = [problem_of(point, symbols) for point in TOUCHPOINTS]
    found += [problem for reads in READS for problem in problems_of(reads, symbols)]
    assert [line for line in found if line] == [problem]


def installed_parameters(target: Any) -> list[str]:
    """As the extract writes them."""
    marks = {
        inspect.Parameter.VAR_POSITIONAL: "*{}",
        inspect.Parameter.VAR_KEYWORD: "**{}",
    }
    return [
        marks.get(p.kind, "{}" if p.default is p.empty else "{}=").format(p.name)
        for p in inspect.signature(
            inspect.unwrap(getattr(target, "__func__", target))
        ).parameters.values()
    ]


INSTALLED = EXTRACTS[minor_of(vllm.__version__)]["symbols"]


@pytest.mark.parametrize("place", INSTALLED)
def test_the_extract_says_what_is_installed(place: str) -> None:
    """Else the reading of sources would prove nothing about those that are not installed."""
    target = resolve(*place.rsplit(".", 1))
    members = members_in(INSTALLED, place)
    assert members is not None
    for name, member in members.items():
        parameters = parameters_of(member)
        if not isinstance(target, type):
            assert installed_parameters(target) == parameters, place
        elif parameters is None:
            assert has_member(target, name), f"{place}.{name}"
        else:
            found = inspect.getattr_static(target, name)
            assert installed_parameters(found) == parameters, f"{place}.{name}"
    if isinstance(target, type):
        assert set(methods(target)) <= members.keys(), place


def methods(cls: type) -> Iterator[str]:
    """Methods that a class has from vLLM's sources, not from a decorator that made them."""
    for base in cls.__mro__:
        for name, attribute in vars(base).items():
            function = inspect.unwrap(getattr(attribute, "__func__", attribute))
            if isinstance(function, FunctionType) and "/vllm/" in function.__code__.co_filename:
                yield name


PACKAGE = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
class Base(Generic[T]):
    kept: int = 0

    def __init__(self, size, *, name=None, **rest):
        self.size, (self.name, other.name) = size, (name, rest)
        self.typed: int

    @property
    def size(self): ...

    def old(self): ...
""",
    "vllm/deep/__init__.py": """
from ..base import Base as Renamed
if True:
    class Child(Renamed[int]):
        LETTERS = 1
        def old(self, first, second=2, *more): ...
        @staticmethod
        def alone(): ...
""",
    "vllm/deep/user.py": "from . import Child",
}


def test_members_are_found_through_imports_and_bases(tmp_path: Path) -> None:
    sdist = tmp_path / "vllm-1.2.3.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path, text in PACKAGE.items():
            entry = tarfile.TarInfo(f"vllm-1.2.3/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    sources = Sources.of(sdist)
    found = sources.find("vllm.deep.user", "Child")
    assert found is not None
    module, node = found
    assert module == "vllm.deep"
    assert sorted(sources.members(module, node).values()) == [
        "LETTERS",
        "__init__(self, size, name=, **rest)",
        "alone()",
        "kept",
        "name",
        "old(self, first, second=, *more)",
        "size",
    ]
    assert sources.find("vllm.deep.user", "Nothing") is None
