"""What the scheduler says, heard whatever vLLM does to its loggers."""

from __future__ import annotations

import logging

import pytest

from vllm_budgetkv.scheduler import banner


@pytest.fixture
def heard(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """`caplog` for the scheduler: vLLM's loggers pass nothing on once an engine was configured, and
    lose their handlers with the next."""
    monkeypatch.setattr(banner, "logger", logging.getLogger("heard"))
    return caplog
