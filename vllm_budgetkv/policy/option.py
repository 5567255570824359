"""An option: a field of a dataclass that says what it means, its unit and what it may be.

Flags, `--help`, checks and `docs/options.md` are made from such fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from os import PathLike
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers that an option may be; `text` follows "a number" in messages and documents."""

    text: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("of at least 0", lambda number: number >= 0)
COUNT = Range("of at least 1", lambda number: number >= 1)
QUERIES = Range("from 1 to 1024", lambda number: 1 <= number <= 1024)
ODD = Range("that is odd and at least 1", lambda number: number >= 1 and number % 2 == 1)
SHARE = Range("from 0 to 1", lambda number: 0 <= number <= 1)
POSITIVE_SHARE = Range("above 0 and at most 1", lambda number: 0 < number <= 1)
WEIGHT = Range("from 0.01 to 100", lambda number: 0.01 <= number <= 100)


@dataclass(frozen=True)
class About:
    """What an option says of itself, beside its name, its type and its default.

    Attributes:
        help: what it does, without its policies.
        metavar: unit, or kind of value, in upper case.
        choices: all that it may be, beside None where its type allows that.
        within: the numbers that it may be.
        policies: names of the policies that read it, if the others refuse it.
        has_flag: False for a knob of `--kv-tuning`.
    """

    help: str
    metavar: str | None
    choices: tuple[str, ...] | None
    within: Range | None
    policies: tuple[str, ...]
    has_flag: bool

    @property
    def meaning(self) -> str:
        """Help with the policies that read it."""
        names = " and ".join(repr(name) for name in self.policies)
        return f"{self.help} Policy {names} only." if names else self.help


def option(
    default: Any,
    help_text: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    within: Range | None = None,
    policies: tuple[str, ...] = (),
) -> Any:
    """A field with a flag of its own, `--kv-` and its name with dashes."""
    said = About(help_text, metavar, choices, within, policies, has_flag=True)
    return field(default=default, metadata={"about": said})


def knob(
    default: Any, help_text: str, *, metavar: str | None = None, within: Range | None = None
) -> Any:
    """A field that is set through `--kv-tuning`."""
    said = About(help_text, metavar, None, within, (), has_flag=False)
    return field(default=default, metadata={"about": said})


def about(item: Field[Any]) -> About:
    """What a field made by `option` or `knob` says of itself."""
    found = item.metadata["about"]
    assert isinstance(found, About)
    return found


def flag_of(item: Field[Any] | str) -> str:
    """The command-line flag of an option, as `--kv-page-quota` of `page_quota`."""
    name = item if isinstance(item, str) else item.name
    return "--kv-" + name.replace("_", "-")


def spelling(item: Field[Any]) -> str:
    """How the user sets it."""
    return flag_of(item) if about(item).has_flag else f"--kv-tuning {item.name}"


def kind_of(item: Field[Any]) -> str:
    """What it may be beside None: `int`, `float`, `bool`, `mapping`, `path`, else `str`."""
    if about(item).metavar == "PATH":
        return "path"
    name = str(item.type).removesuffix(" | None")
    if name.startswith("Mapping"):
        return "mapping"
    return name if name in ("int", "float", "bool") else "str"


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "float": ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("text", lambda v: isinstance(v, str)),
    "path": ("the path of a file", lambda v: isinstance(v, str | PathLike) and bool(str(v))),
    "mapping": ("a JSON object", lambda v: isinstance(v, Mapping)),
}


def may_be(item: Field[Any]) -> str:
    """Its values in words, as "a whole number of at least 1"."""
    within = about(item).within
    text, _ = _KINDS[kind_of(item)]
    return f"{text} {within.text}" if within else text


def check_options(options: Any) -> None:
    """Check every field of a dataclass of options by itself.

    Raises:
        ValueError: one has another type than it must, is no choice or out of its range.
    """
    for item in fields(options):
        value, said = getattr(options, item.name), about(item)
        if value is None and str(item.type).endswith("| None"):
            continue
        if said.choices is not None:
            if value not in said.choices:
                raise ValueError(
                    f"unknown {spelling(item)} {value!r}: choose one of {', '.join(said.choices)}"
                )
            continue
        _, is_kind = _KINDS[kind_of(item)]
        if not is_kind(value) or (said.within is not None and not said.within.holds(value)):
            raise ValueError(f"{spelling(item)} must be {may_be(item)}; got {value!r}")


def refuse_foreign(options: Any, served: tuple[str, ...]) -> None:
    """Refuse options that were set although none of the policies served reads them.

    Raises:
        ValueError: names the option and the policies.
    """
    for item in fields(options):
        value, readers = getattr(options, item.name), about(item).policies
        if readers and not set(readers) & set(served) and value != item.default:
            raise ValueError(
                f"{spelling(item)} {value} is of --kv-policy {' and '.join(readers)}; got "
                f"--kv-policy {' and '.join(served)}"
            )
