"""Small models, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_budgetkv.testing.models import build_llama, build_qwen2_5_vl

MODELS = Path(__file__).parents[2] / "build" / "models"


@pytest.fixture(scope="session")
def vision_model() -> Path:
    return build_qwen2_5_vl(MODELS)


@pytest.fixture(scope="session")
def text_model() -> Path:
    return build_llama(MODELS)
