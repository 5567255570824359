"""The command line itself: fast, and nothing heavy before a command runs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_budgetkv import __version__
from vllm_budgetkv.cli.main import main

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "numpy", "transformers", "rich")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["inspect", "--help"], ["doctor", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"for name in {HEAVY!r}: sys.modules[name] = None\n"
        "from vllm_budgetkv.cli.main import main\n"
        f"main({arguments!r})"
    )
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: vllm-budgetkv")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vllm-budgetkv {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["plan"], "the following arguments are required: --model"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["plan", "--model", "m", "--tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_the_package_declares_the_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["vllm-budgetkv"].partition(":")
    assert getattr(sys.modules[module], function) is main
