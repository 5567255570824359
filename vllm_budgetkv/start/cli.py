"""Flags of every `vllm` command that takes engine arguments, made from the options."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.policy.option import about, flag_of, kind_of
from vllm_budgetkv.start.config import SECTION, budget_options, section_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, as {{...}}; got {text}")
    return value


_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "path": str,
    "mapping": _json_object,
}


def _destination(option: Field[Any]) -> str:
    return f"{SECTION}_{option.name}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per option. Mutates `parser`; a flag that is already there is left alone."""
    group = parser.add_argument_group(
        title="BudgetKV", description="KV cache of each request bounded by a quota of blocks."
    )
    for option in budget_options():
        flag = flag_of(option)
        if flag in parser._option_string_actions:
            continue
        # absent unless given, so that help shows the option's default and not the flag's
        settings: dict[str, Any] = {"dest": _destination(option), "default": argparse.SUPPRESS}
        said = about(option)
        settings["help"] = said.meaning
        if option.default is not None:
            settings["help"] += f" (default: {option.default})"
        if kind_of(option) == "bool":
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = _TYPES[kind_of(option)]
            settings["choices"], settings["metavar"] = said.choices, said.metavar
        group.add_argument(flag, **settings)


def fold_flags(args: argparse.Namespace) -> None:
    """Move the flags of `args` into `args.additional_config`. Mutates `args`.

    Flags keep their own place until all of the command line is read, so that their order with
    `--additional-config` does not matter.

    Raises:
        ValueError: a flag and `--additional-config` give one option two values, or ours is no
            object there.
    """
    given = {
        option.name: getattr(args, _destination(option))
        for option in budget_options()
        if getattr(args, _destination(option), None) is not None
    }
    if not given:
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    section = dict(section_of(additional))
    for name, value in given.items():
        if name in section and section[name] != value:
            raise ValueError(
                f"{flag_of(name)} is {value!r} but --additional-config says "
                f"{SECTION}.{name} is {section[name]!r}: give one of them"
            )
        section[name] = value
    additional[SECTION] = section
    args.additional_config = additional
