"""Environment of the tests, and the models that they share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# several processes of tests share the cores: a thread that waits must not spin
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch

from vllm_budgetkv.ops import backend, extension

if TYPE_CHECKING:
    from collections.abc import Callable

# set before anything imports vLLM, and inherited by its processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

MODELS = Path(__file__).parent.parent / "build" / "models"
# files whose tests share nothing and take long
STANDALONE = {"test_triton.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first, so that no process of tests waits for another's at the end; a file's tests
    share its engine, so they stay in one process, but those that start a process of their own."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    for item in items:
        name = item.nodeid if item.path.name in STANDALONE else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))


def pytest_sessionstart() -> None:
    """Ends the run at once where the C++ extension is missing or does not fit its torch.

    A machine with a GPU needs none: what runs there are the kernels in Triton.
    """
    if torch.cuda.is_available() or backend.of(torch.empty(0)) != "cpp":
        return
    try:
        extension.load()
    except (ImportError, OSError) as error:
        pytest.exit(f"{error}; `make env` builds it", returncode=3)


def _model(name: str) -> Callable[[], Path]:
    @pytest.fixture(scope="session", name=name)
    def build() -> Path:
        from vllm_budgetkv.testing import models

        return getattr(models, f"build_{name}")(MODELS)

    return build


qwen2_5_vl = _model("qwen2_5_vl")
qwen2 = _model("qwen2")
llama = _model("llama")
