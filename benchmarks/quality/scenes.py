"""Videos made of cells: a letter and a digit on a red sign, or a piece of landscape.

A scene is an array of cell ids, one cell a token. Training looks the patches of a cell up; the
suite draws the same cells as pixels and lets the model's own processor cut them into patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vllm_budgetkv.testing import frames
from vllm_budgetkv.testing.shapes import CELL_PIXELS, FRAMES_PER_TOKEN

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLProcessor

LETTERS = frames.LETTERS
NUM_DIGITS = 10
NUM_VARIANTS = 4
NUM_SIGNS = len(LETTERS) * NUM_DIGITS
NUM_LANDSCAPES = 256
NOISE_LEVELS = 10.0


def sign_id(pair: str, variant: int = 0) -> int:
    """Cell of a letter and a digit, such as "K7", in one of `NUM_VARIANTS` drawings."""
    return variant * NUM_SIGNS + LETTERS.index(pair[0]) * NUM_DIGITS + int(pair[1])


def landscape_id(index: int) -> int:
    """One of `NUM_LANDSCAPES` cells that show nothing to read."""
    return NUM_VARIANTS * NUM_SIGNS + index % NUM_LANDSCAPES


@dataclass(frozen=True)
class Palette:
    """Every cell that a scene can show.

    Args:
        seed: of the noise and of the places of the landscape's pieces.
    """

    seed: int = 0

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [cells, `CELL_PIXELS`, `CELL_PIXELS`, 3]."""
        rng = np.random.default_rng(self.seed)
        cells = [self._sign(index, rng) for index in range(NUM_VARIANTS * NUM_SIGNS)]
        cells += [self._landscape(rng) for _ in range(NUM_LANDSCAPES)]
        return np.stack(cells)

    def _sign(self, index: int, rng: np.random.Generator) -> np.ndarray:
        letter, digit = divmod(index % NUM_SIGNS, NUM_DIGITS)
        size = (CELL_PIXELS, CELL_PIXELS)
        cell = frames.render_frame(0, size_pixels=size, text=f"{LETTERS[letter]}{digit}", rng=rng)
        noise = rng.normal(0.0, NOISE_LEVELS, (CELL_PIXELS, CELL_PIXELS, 3))
        return np.clip(np.asarray(cell) + noise, 0, 255).astype(np.uint8)

    def _landscape(self, rng: np.random.Generator) -> np.ndarray:
        wide = frames.render_frame(int(rng.integers(1000)), size_pixels=(336, 336), text="")
        left, top = rng.integers(0, 336 - CELL_PIXELS, 2)
        box = (int(left), int(top), int(left) + CELL_PIXELS, int(top) + CELL_PIXELS)
        return np.asarray(wide.crop(box))

    def patches(self, processor: Qwen2_5_VLProcessor) -> torch.Tensor:
        """What the processor makes of every cell: float32 [cells, patches of a cell, values]."""
        video = np.repeat(self.pixels, FRAMES_PER_TOKEN, axis=0)
        output = processor.video_processor(
            videos=[video], do_sample_frames=False, return_tensors="pt"
        )
        return output["pixel_values_videos"].view(
            len(self.pixels), -1, output["pixel_values_videos"].shape[-1]
        )

    def draw(self, scene: np.ndarray) -> np.ndarray:
        """Pixels of a scene, int [F, rows, columns] of cell ids.

        Returns:
            uint8 [F * `FRAMES_PER_TOKEN`, height, width, 3]: each frame fills a token.
        """
        cells = self.pixels[scene]
        num_frames, rows, columns = scene.shape
        tall = cells.transpose(0, 1, 3, 2, 4, 5)
        video = tall.reshape(num_frames, rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
        return np.repeat(video, FRAMES_PER_TOKEN, axis=0)

    def image(self, scene: np.ndarray) -> Image.Image:
        """The first frame of a scene."""
        return Image.fromarray(self.draw(scene[:1])[0])
