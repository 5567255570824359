"""Commands in the documents parse, and their options make a configuration; nothing is started."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_budgetkv.start.cli import fold_flags
from vllm_budgetkv.start.config import SECTION, BudgetConfig

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md")),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# an indented block: a command, and the lines that it goes on in
COMMAND = re.compile(r"^    (?:\$ )?((?:[A-Z_]+=\S* )*\w[\w.-]*(?: (?:[^\n]*\\\n)*[^\n]*)?)$", re.M)
PROGRAMS = ("vllm", "vllm-budgetkv", "python", "pip", "make")
# of an installation beside this repository, or shown with "..." in the place of options
OF_OTHERS = ("lmms_eval", "benchmarks.quality.lmms_eval")


def commands() -> list[tuple[str, list[str]]]:
    """Document and words of each command that we can read."""
    found = []
    for document in DOCUMENTS:
        for text in COMMAND.findall(document.read_text(encoding="utf-8")):
            if text.partition(" ")[0] not in PROGRAMS:
                continue
            words = shlex.split(text.replace("\\\n", " "), comments=True)
            words = words[: words.index(">")] if ">" in words else words
            found.append((str(document.relative_to(ROOT)), words))
    return found


def of_program(*names: str) -> list[Any]:
    """Those that begin with one of `names`, with ids that say where they stand."""
    return [
        pytest.param(words, id=f"{document}-{' '.join(words[:3])}-{number}")
        for number, (document, words) in enumerate(commands())
        if any(" ".join(words).startswith(name) for name in names)
    ]


@cache
def engine_parser(kind: str) -> argparse.ArgumentParser:
    """vLLM's own parser of `vllm serve` or `vllm run-batch`, with our flags."""
    from vllm.entrypoints.launchers import cli_args, run_batch
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    make = run_batch.make_arg_parser if kind == "run-batch" else cli_args.make_arg_parser
    return make(FlexibleArgumentParser(exit_on_error=False))


def check_engine(words: list[str], kind: str = "serve") -> None:
    """The words of an engine: each is known, and ours make a configuration."""
    options = engine_parser(kind).parse_args(words)
    fold_flags(options)
    if section := (options.additional_config or {}).get(SECTION):
        BudgetConfig.from_mapping(section)


@pytest.mark.parametrize("words", of_program("vllm serve", "vllm run-batch"))
def test_a_server_is_started_with_options_that_it_has(words: list[str]) -> None:
    check_engine(words[2:], words[1])


@pytest.mark.parametrize("words", of_program("vllm-budgetkv "))
def test_our_command_knows_its_options(words: list[str]) -> None:
    from vllm_budgetkv.cli import main

    options, others = main._parsers()[0].parse_known_args(words[1:])
    if options.command == "doctor":
        assert not others
    else:
        policy = [] if "--kv-policy" in others else ["--kv-policy", "hybrid"]
        has_quota = any(word.endswith(("-quota", "-quota-tokens")) for word in others)
        quota = [] if has_quota else ["--kv-page-quota", "64"]
        check_engine([*others, *policy, *quota])


@pytest.mark.parametrize("words", of_program("python "))
def test_what_python_runs_is_there(words: list[str]) -> None:
    if words[1] == "-c" or "." not in words[2] and words[2] in OF_OTHERS or "..." in words:
        return
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words[1]
        return
    place = ROOT.joinpath(*words[2].split("."))
    assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), words[2]
    if words[2] == "vllm_budgetkv.ray":
        from vllm_budgetkv import ray

        _, of_server = ray._parser().parse_known_args(words[3:])
        check_engine(of_server)


@pytest.mark.parametrize("words", of_program("make "))
def test_make_has_the_target(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = [word for word in words[1:] if "=" not in word]
    assert named and set(named) <= set(targets)


@pytest.mark.parametrize("words", of_program("pip install"))
def test_pip_installs_an_extra_that_there_is(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"vllm-budgetkv\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = \[", project, re.M)


@pytest.mark.parametrize(
    "words",
    [
        ["--kv-policy", "hybrid", "--kv-page-qouta", "64"],
        ["--kv-policy", "hybrid", "--kv-page-quota", "64", "--kv-quota-tokens", "8"],
        ["--kv-policy", "hybrid", "--kv-page-quota", "0"],
    ],
)
def test_a_wrong_option_is_found(words: list[str]) -> None:
    with pytest.raises((SystemExit, ValueError)):
        check_engine(words)


def test_all_of_them_are_seen() -> None:
    """A block that the pattern misses would be checked by nobody."""
    documents = {document for document, _ in commands()}
    assert {"README.md", "docs/tutorial.md", "docs/batch.md", "docs/inspect.md"} <= documents
    assert len(commands()) > 35
