"""Models without weights, and `plan` as a function."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.cli.folders import write_qwen2_5_vl_7b
from vllm_budgetkv.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


class RunPlan(Protocol):
    """Runs `plan` with these arguments and gives its object; a refusal is a ValueError."""

    def __call__(self, *arguments: str) -> dict[str, Any]: ...


@pytest.fixture(scope="session")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sizes of Qwen2.5-VL-7B, with a processor and without weights."""
    return write_qwen2_5_vl_7b(tmp_path_factory.mktemp("models") / "Qwen2.5-VL-7B")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its config.json alone."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    return write_qwen2_5_vl_7b(folder, has_processor=False)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` sets of the environment is put back."""
    for name in ("VLLM_TARGET_DEVICE", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def plan_of(environment: None, capsys: pytest.CaptureFixture[str]) -> RunPlan:
    def run(*arguments: str) -> dict[str, Any]:
        status = main(["plan", "--json", *arguments])
        found = capsys.readouterr()
        if status:
            assert status == 2 and not found.out
            raise ValueError(found.err)
        return json.loads(found.out)

    return run
