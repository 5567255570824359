"""Which implementation of the ops is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from vllm_budgetkv.ops import backend

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU, GPU = torch.zeros(0), Mock(spec=torch.Tensor, is_cuda=True)


@pytest.fixture(autouse=True)
def decide_again() -> Iterator[None]:
    """The choice is made once per process, so it is forgotten before and after each test."""
    forget()
    yield
    forget()


def forget() -> None:
    backend._chosen.cache_clear()
    backend._require_interpreter.cache_clear()


@pytest.mark.parametrize(
    ("value", "on_cpu", "on_gpu"),
    [
        (None, "cpp", "triton"),
        ("kernels", "cpp", "triton"),
        ("reference", "reference", "reference"),
        ("triton", "triton", "triton"),
    ],
)
def test_device_or_environment_chooses(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on_cpu: str, on_gpu: str
) -> None:
    monkeypatch.setenv(backend.INTERPRETER_VARIABLE, "1")
    if value is None:
        monkeypatch.delenv(backend.BACKEND_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(backend.BACKEND_VARIABLE, value)
    assert backend.of(CPU) == on_cpu
    assert backend.of(GPU) == on_gpu


def test_unknown_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "fast")
    with pytest.raises(ValueError, match="VLLM_BUDGETKV_OPS=fast"):
        backend.of(CPU)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "triton")
    monkeypatch.delenv(backend.INTERPRETER_VARIABLE, raising=False)
    assert backend.of(GPU) == "triton"
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        backend.of(CPU)
