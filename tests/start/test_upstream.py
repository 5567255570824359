"""Every vLLM symbol that we touch is in the table, and the table fits what is installed."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from vllm_budgetkv import plugin
from vllm_budgetkv.scheduler.answers import Told
from vllm_budgetkv.scheduler.connector import HostConnector
from vllm_budgetkv.scheduler.manager import QuotaManager
from vllm_budgetkv.scheduler.scheduler import BudgetScheduler
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.scheduler.turns import TurnScheduler
from vllm_budgetkv.start import upstream
from vllm_budgetkv.start.touchpoint import Touchpoint
from vllm_budgetkv.start.upstream import TOUCHPOINTS
from vllm_budgetkv.start.upstream_reads import PLAN_READS, READS, Reads
from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.backend import BudgetBackend
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder
from vllm_budgetkv.worker.telling import ToldOutput
from vllm_budgetkv.worker.worker import BudgetWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "upstream.md"
SUBCLASSES = (
    QuotaSpec,
    QuotaManager,
    HostConnector,
    BudgetScheduler,
    TurnScheduler,
    BudgetBackend,
    BudgetMetadataBuilder,
    BudgetAttention,
    BudgetWorker,
    Told,
    ToldOutput,
)


def place(point: Touchpoint) -> str:
    return point.place


def overrides(cls: type) -> Iterator[str]:
    """Attributes of `cls` that hide one of a vLLM class, as vLLM's full names."""
    for name, attribute in vars(cls).items():
        if name == "_abc_impl" or (name.startswith("__") and not is_written_by_us(attribute)):
            continue
        for base in cls.__mro__[1:]:
            if base.__module__.startswith("vllm.") and name in vars(base):
                yield f"{base.__module__}.{base.__qualname__}.{name}"
                break


def is_written_by_us(attribute: Any) -> bool:
    """Whether it is a function with a source file, not one that `dataclass` made."""
    return isinstance(attribute, FunctionType) and "vllm_budgetkv" in attribute.__code__.co_filename


@pytest.mark.parametrize("point", TOUCHPOINTS, ids=place)
def test_fits_the_installed_vllm(point: Touchpoint) -> None:
    assert point.problem() is None


def test_check_accepts_the_installed_vllm() -> None:
    upstream.check()


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_every_override_is_in_the_table(cls: type) -> None:
    listed = {place(point) for point in TOUCHPOINTS if point.how == "override"}
    found = set(overrides(cls))
    assert found, "a subclass that changes nothing has no reason to be"
    assert found <= listed


def test_the_table_lists_no_override_that_is_gone() -> None:
    listed = {place(point) for point in TOUCHPOINTS if point.how == "override"}
    assert listed == {name for cls in SUBCLASSES for name in overrides(cls)}


def test_overridden_functions_are_pinned() -> None:
    for point in TOUCHPOINTS:
        target = point.resolve()
        function = getattr(target, "__func__", target)
        if point.how in ("override", "register") and inspect.isfunction(function):
            assert point.parameters is not None, place(point)


def test_no_symbol_is_listed_twice() -> None:
    names = [place(point) for point in TOUCHPOINTS]
    names += [
        f"{reads.place}.{member}" for reads in (*READS, *PLAN_READS) for member in reads.members
    ]
    assert len(set(names)) == len(names)


def test_an_override_takes_what_vllm_passes() -> None:
    """Our parameters are vLLM's, in vLLM's order, so that positional calls mean the same."""
    for point in TOUCHPOINTS:
        if point.how != "override" or point.parameters is None:
            continue
        name = point.name.split(".")[1]
        (cls,) = (cls for cls in SUBCLASSES if place(point) in set(overrides(cls)))
        own = inspect.getattr_static(cls, name)
        parameters = inspect.signature(getattr(own, "__func__", own)).parameters
        if any(p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        assert tuple(parameters)[: len(point.parameters)] == point.parameters, place(point)
        extra = list(parameters.values())[len(point.parameters) :]
        assert all(parameter.default is not parameter.empty for parameter in extra), place(point)


def changed(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Put a changed copy of one row into the table."""
    row = next(p for p in TOUCHPOINTS if p.name == "Scheduler.add_request")
    monkeypatch.setattr(upstream, "TOUCHPOINTS", (dataclasses.replace(row, **changes),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "vllm.v1.nowhere"}, "vllm.v1.nowhere.Scheduler.add_request: missing"),
        ({"name": "Scheduler.nothing"}, "Scheduler.nothing: missing"),
        (
            {"parameters": ("self", "request", "urgency")},
            "takes ('self', 'request'), expected ('self', 'request', 'urgency')",
        ),
        ({"parameters": ("request", "self")}, "takes ('self', 'request')"),
    ],
    ids=["module", "symbol", "parameter", "order"],
)
def test_another_vllm_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    changed(monkeypatch, **changes)
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        upstream.check()
    assert "start without --kv-policy" in str(caught.value)


def test_a_changed_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_request(self: Any, request: Any, urgency: int) -> None: ...

    monkeypatch.setattr("vllm.v1.core.sched.scheduler.Scheduler.add_request", add_request)
    with pytest.raises(RuntimeError, match=r"Scheduler.add_request: takes .*'urgency'"):
        upstream.check()


def test_a_missing_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be missed in the first request that needed it."""
    reads = Reads("vllm.v1.request", "Request", "test", ("urgency", "request_id"))
    monkeypatch.setattr(upstream, "READS", (*READS, reads))
    with pytest.raises(RuntimeError, match=r"\n  vllm.v1.request.Request.urgency: missing$"):
        upstream.check()


def test_a_missing_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "READS", (Reads("vllm.v1.request", "Wish", "test", ("old",)),))
    with pytest.raises(RuntimeError, match=r"vllm.v1.request.Wish: missing"):
        upstream.check()


class Sample:
    """Has members in every way in which vLLM's classes have theirs."""

    annotated: int
    constant = 1

    def __init__(self, first: int, second: int = 2) -> None:
        self.first = first
        self.unpacked, self._hidden = first, second
        other = SimpleNamespace()
        other.foreign = 1

    @property
    def lazy(self) -> int:
        self.made_late = 1
        return lambda: self

    def method(self, value: int, extra: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("annotated", None),
        ("constant", None),
        ("first", None),
        ("unpacked", None),
        ("_hidden", None),
        ("lazy", None),
        ("made_late", None),
        ("second", "missing"),
        ("foreign", "missing"),
        ("(first)", None),
        ("(first, second)", None),
        ("(second)", "wants first too"),
        ("(first, third)", "takes no third"),
        ("method(value)", None),
        ("method()", "wants value too"),
        ("gone()", "missing"),
    ],
)
def test_members_of_a_class(member: str, problem: str | None) -> None:
    found = list(Reads("somewhere", "Sample", "test", (member,)).problems(Sample))
    name = member.partition("(")[0] or "__init__"
    assert found == ([f"somewhere.Sample.{name}: {problem}"] if problem else [])


def test_a_missing_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.v1.core.sched.scheduler.Scheduler._free_request")
    with pytest.raises(RuntimeError, match="Scheduler._free_request: missing"):
        upstream.check()


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0", "0.320.0", "0.3", "1.0.33"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    message = f"supports vLLM 0.32 or 0.33, found {version}: install one of them"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        upstream.check()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.2rc1", "0.33.0", "0.33.1"])
def test_a_patch_release_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    upstream.check()


def test_the_document_is_up_to_date() -> None:
    text = upstream.as_markdown()
    assert DOCUMENT.read_text(encoding="utf-8") == text, (
        "run `python -m vllm_budgetkv.start.upstream > docs/upstream.md`"
    )
    assert all(f"| `{place(point)}` | {point.how} |" in text for point in TOUCHPOINTS)
    assert all(f"| `{reads.place}` | " in text for reads in (*READS, *PLAN_READS))


@pytest.fixture
def stock_arguments(monkeypatch: pytest.MonkeyPatch) -> type[EngineArgs]:
    """`EngineArgs` whose methods are put back when the test ends."""
    for point in TOUCHPOINTS:
        if point.how == "wrap" and point.name.startswith("EngineArgs."):
            name = point.name.split(".")[1]
            monkeypatch.setattr(EngineArgs, name, inspect.getattr_static(EngineArgs, name))
    return EngineArgs


def test_wrap_is_idempotent(stock_arguments: type[EngineArgs]) -> None:
    wrapped = [p.name.split(".") for p in TOUCHPOINTS if p.how == "wrap"]
    names = [name for owner, name in wrapped if owner == "EngineArgs"]
    plugin.register()
    first = {name: inspect.getattr_static(stock_arguments, name) for name in names}
    plugin.register()
    assert {name: inspect.getattr_static(stock_arguments, name) for name in names} == first


def test_wrap_keeps_the_kind_of_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        @classmethod
        def build(cls, value: int) -> tuple[str, int]:
            return cls.__name__, value

        @staticmethod
        def twice(value: int) -> int:
            return 2 * value

        def add(self, value: int) -> int:
            return value + 1

    class Child(Owner):
        pass

    names = ("build", "twice", "add")
    points = tuple(Touchpoint("owner", f"Owner.{name}", "wrap", "test") for name in names)
    monkeypatch.setattr(upstream, "TOUCHPOINTS", points)
    monkeypatch.setattr(
        upstream, "importlib", SimpleNamespace(import_module=lambda _: SimpleNamespace(Owner=Owner))
    )
    for name in names:
        upstream.wrap(f"Owner.{name}", lambda original, *args: ("ours", original(*args)))
    assert Child.build(3) == ("ours", ("Child", 3))
    assert Owner.twice(3) == ("ours", 6) == Owner().twice(3)
    assert Owner().add(3) == ("ours", 4)


def test_wrap_knows_only_the_table() -> None:
    with pytest.raises(KeyError, match="nothing"):
        upstream.wrap("EngineArgs.nothing", lambda original: original)
