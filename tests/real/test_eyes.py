"""The model with eyes: its tower writes the words on frames, and all else is SmolLM2's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.real import eyes, eyes_fit
from benchmarks.real.cells import CELLS, Vocabulary, draw_frames, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

NUM_FRAMES = 100
# the tower was fitted on others
HELD_OUT_SEED = 7


@pytest.fixture(scope="module")
def folder(smollm2: Path) -> Path:
    """Written the first time, where there are weights; `smollm2` says when the test is skipped."""
    assert smollm2.is_dir()
    return eyes.eyes_folder()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.mark.timeout(600)
def test_rows_of_a_frame_are_those_of_its_words(model: Any, processor: Any) -> None:
    """Nearest among all 49,152 rows of the table, and nearly the row itself."""
    words, rng = vocabulary(processor.tokenizer), np.random.default_rng(HELD_OUT_SEED)
    drawn = rng.integers(len(words.ids), size=(NUM_FRAMES, CELLS))
    images = list(draw_frames(drawn, words, rng))
    inputs = processor(text=eyes.IMAGE * NUM_FRAMES, images=images, return_tensors="pt")
    with torch.no_grad():
        states = model.model.vision_model(inputs["pixel_values"][0]).last_hidden_state
        rows = model.model.connector(states).flatten(0, 1)
        table = model.model.text_model.embed_tokens.weight
        wanted = torch.tensor(words.ids)[drawn.ravel()]
        right = torch.cdist(rows, table).argmin(dim=1) == wanted
        error = (rows - table[wanted]).norm(dim=1) / table[wanted].norm(dim=1)
    assert right.float().mean() > 0.99
    assert error.quantile(0.95) < 0.01


def test_a_frame_is_as_many_tokens_as_the_tasks_count(processor: Any) -> None:
    frame = np.zeros((2, 128, 128, 3), np.uint8)
    inputs = processor(text=eyes.IMAGE * 2, images=list(frame), return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 2 * eyes.FRAME_TOKENS)
    image = processor.tokenizer.convert_tokens_to_ids(eyes.IMAGE)
    assert (inputs["input_ids"] == image).sum() == 2 * CELLS


def test_the_language_model_is_untouched(folder: Path, smollm2: Path) -> None:
    from safetensors import safe_open

    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(smollm2 / "model.safetensors", "pt") as theirs,
    ):
        for name in theirs.keys():  # noqa: SIM118
            found = ours.get_tensor(eyes.TEXT + name.removeprefix("model."))
            torch.testing.assert_close(found, theirs.get_tensor(name), rtol=0, atol=0)


def test_norms_are_made_equal_and_the_embedding_comes_back() -> None:
    table = np.random.default_rng(0).normal(0.1, size=(7, 576))
    values, scale = eyes_fit.equal_norms(table)
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=1e-9)
    back = scale * eyes_fit.normed(values)[:, :576]
    np.testing.assert_allclose(back, table, rtol=1e-5)


def test_words_that_look_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eyes_fit, "FIT_FRAMES", 40)
    words = Vocabulary(ids=(1, 2, 3), labels=("well", "well", "wall"), keys=())
    with pytest.raises(ValueError, match="look like"):
        eyes_fit.fit(words, np.ones((3, 576), np.float32))
