"""The weights of a vision tower that reads the cells of frames, in closed form; seconds on a core.

The tower has to put the language model's own embedding of a cell's token into the row that vLLM
inserts for the cell. Nothing is asked of the language model. One layer of the SigLIP kind does it:

- Patches are cells. Their filters are Fisher's linear discriminants: directions in which the
  vocabulary's letters differ most against what scenery and colours change.
- The layer's attention writes nothing: a cell is read on its own.
- Each word has one hidden unit of the MLP. It compares the normed features with the word's and is
  open above a threshold that is halfway between the word and the nearest other one, as regressed
  from drawn frames.
- An open unit writes its word's embedding, with two more channels that give every word the same
  norm and no mean, so that the last norm keeps the embedding as it is; the connector scales it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.real.cells import (
    CELL_PIXELS,
    CELLS,
    CELLS_PER_SIDE,
    draw_frames,
)

if TYPE_CHECKING:
    from benchmarks.real.cells import Vocabulary

LAYER = "model.vision_model.encoder.layers.0"
SEED = 20261126
FIT_FRAMES, FRAMES_AT_ONCE = 3000, 200
FEATURES, HIDDEN = 600, 640
NOISE_FLOOR = 1e-4  # of a pixel, -1 to 1; keeps filters off what is no wider than rounding
NORM_EPS = 1e-6
CLOSED = 4.0  # what a unit's input is below its threshold for the nearest other word
OVERWRITE = 2e4  # how much larger a written word is than the features that it is added to


@dataclass(frozen=True)
class Cells:
    """Drawn cells. N of them.

    Attributes:
        pixels: float32 [N, CELL_PIXELS ** 2], mean of the colours, -1 to 1.
        rows: int [N], of the vocabulary.
    """

    pixels: np.ndarray
    rows: np.ndarray


def drawn(words: Vocabulary, num_frames: int, seed: int) -> Cells:
    """Cells of frames of words by lot."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(words.ids), size=(num_frames, CELLS))
    side = CELLS_PER_SIDE
    pixels = []
    for start in range(0, num_frames, FRAMES_AT_ONCE):
        frames = draw_frames(rows[start : start + FRAMES_AT_ONCE], words, rng).mean(axis=-1)
        cut = frames.reshape(-1, side, CELL_PIXELS, side, CELL_PIXELS).swapaxes(2, 3)
        pixels.append((cut.reshape(-1, CELL_PIXELS**2) / 127.5 - 1).astype(np.float32))
    return Cells(np.concatenate(pixels), rows.ravel())


def fit(words: Vocabulary, table: np.ndarray) -> dict[str, np.ndarray]:
    """Weights of vision tower and connector by the names of transformers, float32.

    Args:
        words: V words that are drawn.
        table: float32 [V, C], their embeddings.

    Raises:
        ValueError: two words cannot be told apart.
    """
    cells = drawn(words, FIT_FRAMES, SEED)
    filters, means = discriminants(cells, len(words.ids))
    offset = means.mean(axis=0) @ filters
    keys = normed(means @ filters - offset)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    least, most = margins(normed(cells.pixels @ filters - offset) @ keys.T, cells.rows)
    if (least <= most).any():
        alike = [words.labels[row] for row in np.flatnonzero(least <= most)]
        raise ValueError(f"cells of {alike} look like those of other words")
    gains = 2 * CLOSED / (least - most)
    values, scale = equal_norms(table)
    weights = {
        "model.vision_model.embeddings.patch_embedding.weight": as_patches(filters),
        "model.vision_model.embeddings.patch_embedding.bias": -offset,
        "model.vision_model.embeddings.position_embedding.weight": np.zeros((CELLS, HIDDEN)),
        f"{LAYER}.mlp.fc1.weight": keys * gains[:, None],
        f"{LAYER}.mlp.fc1.bias": -gains * (least + most) / 2,
        f"{LAYER}.mlp.fc2.weight": OVERWRITE * values.T,
        f"{LAYER}.mlp.fc2.bias": np.zeros(HIDDEN),
        "model.connector.modality_projection.proj.weight": scale * np.eye(table.shape[1], HIDDEN),
    }
    weights |= plain_weights()
    return {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}


def plain_weights() -> dict[str, np.ndarray]:
    """Attention that writes nothing, and norms that only norm."""
    found: dict[str, np.ndarray] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        found[f"{LAYER}.self_attn.{name}.weight"] = np.zeros((HIDDEN, HIDDEN))
        found[f"{LAYER}.self_attn.{name}.bias"] = np.zeros(HIDDEN)
    norms = (f"{LAYER}.layer_norm1", f"{LAYER}.layer_norm2", "model.vision_model.post_layernorm")
    for norm in norms:
        found[f"{norm}.weight"], found[f"{norm}.bias"] = np.ones(HIDDEN), np.zeros(HIDDEN)
    return found


def discriminants(cells: Cells, num_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Filters [pixels, HIDDEN], the last of them zeros, and the mean cell of each word."""
    counts = np.bincount(cells.rows, minlength=num_words)
    means = np.zeros((num_words, cells.pixels.shape[1]))
    np.add.at(means, cells.rows, cells.pixels)
    means /= counts[:, None]
    within = np.cov((cells.pixels - means[cells.rows]).T)
    variances, axes = np.linalg.eigh(within + NOISE_FLOOR * np.eye(len(within)))
    whiten = axes / np.sqrt(variances)
    _, between = np.linalg.eigh(np.cov((means @ whiten).T))
    filters = np.zeros((len(within), HIDDEN))
    filters[:, :FEATURES] = whiten @ between[:, ::-1][:, :FEATURES]
    return filters, means


def normed(features: np.ndarray) -> np.ndarray:
    """A layer norm without weights."""
    centred = features - features.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + NORM_EPS)


def margins(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least score of a word's own cells, largest of any other cell), each [V]; mutates scores."""
    every = np.arange(len(rows))
    least = np.full(scores.shape[1], np.inf)
    np.minimum.at(least, rows, scores[every, rows])
    scores[every, rows] = -np.inf
    return least, scores.max(axis=0)


def equal_norms(table: np.ndarray) -> tuple[np.ndarray, float]:
    """Embeddings with two channels more, so that their mean is 0 and their norms are equal.

    Returns:
        [V, HIDDEN], and the factor that a norm over HIDDEN channels takes from them.
    """
    total, squares = table.sum(axis=1), (table**2).sum(axis=1)
    norm_square = (squares + total**2 / 2).max()
    # p + q = -total and p * p + q * q = norm_square - squares
    half = np.sqrt((norm_square - squares) / 2 - total**2 / 4)
    values = np.zeros((len(table), HIDDEN))
    values[:, : table.shape[1]] = table
    values[:, -2], values[:, -1] = -total / 2 + half, -total / 2 - half
    return values, float(np.sqrt(norm_square / HIDDEN))


def as_patches(filters: np.ndarray) -> np.ndarray:
    """[HIDDEN, 3, CELL_PIXELS, CELL_PIXELS], alike for the three colours."""
    kernel = filters.T.reshape(HIDDEN, 1, CELL_PIXELS, CELL_PIXELS) / 3
    return kernel.repeat(3, axis=1)
