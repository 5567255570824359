"""Renders labelled frames and packs them as vLLM's OpenAI server takes them; Pillow only."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vllm_budgetkv.testing.shapes import CELL_PIXELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
SIGN_COLOUR = (200, 30, 40)
DRIFT_PIXELS = 3


def render_frame(
    index: int,
    *,
    size_pixels: tuple[int, int] = (112, 112),
    text: str | None = None,
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """Draws one frame: a drifting landscape, and one red cell with a letter and a digit on it.

    Args:
        index: number of the frame in its video; moves the background.
        size_pixels: (width, height), each at least `CELL_PIXELS`.
        text: what the cell shows; a random letter and digit when None, no cell when empty.
        rng: chooses the text and its cell; seeded with `index` when None.

    Returns:
        An RGB image of `size_pixels`.

    Raises:
        ValueError: a frame smaller than a cell.
    """
    width, height = size_pixels
    if min(width, height) < CELL_PIXELS:
        raise ValueError(f"size_pixels={size_pixels} is below one cell of {CELL_PIXELS} pixels")
    rng = rng if rng is not None else np.random.default_rng(index)
    frame = Image.fromarray(_landscape(index, width, height))
    if text is None:
        text = f"{LETTERS[rng.integers(len(LETTERS))]}{rng.integers(10)}"
    if text:
        column = int(rng.integers(width // CELL_PIXELS))
        row = int(rng.integers(height // CELL_PIXELS))
        _draw_sign(frame, text, column * CELL_PIXELS, row * CELL_PIXELS)
    return frame


def render_video(
    num_frames: int,
    *,
    size_pixels: tuple[int, int] = (112, 112),
    seed: int = 0,
    signs: Mapping[int, str] | None = None,
) -> np.ndarray:
    """Draws a video.

    Args:
        num_frames: length of the video.
        size_pixels: (width, height) of each frame.
        seed: of the texts and their cells.
        signs: text by frame number, no sign on all others; a random one on every frame when None.

    Returns:
        uint8 array `[num_frames, height, width, 3]`, RGB.
    """
    rng = np.random.default_rng(seed)
    texts = [None if signs is None else signs.get(index, "") for index in range(num_frames)]
    frames = (
        render_frame(index, size_pixels=size_pixels, text=text, rng=rng)
        for index, text in enumerate(texts)
    )
    return np.stack([np.asarray(frame) for frame in frames])


def image_data_url(image: Image.Image) -> str:
    """The image as a PNG data URL, for an `image_url` part of a chat message."""
    return f"data:image/png;base64,{_encode(image, 'PNG')}"


def video_data_url(frames: Iterable[np.ndarray]) -> str:
    """RGB frames `[height, width, 3]` uint8 as a data URL of JPEG images, for a `video_url` part.

    vLLM reads base64 JPEGs divided by commas under the media type video/jpeg and takes each for one
    frame.
    """
    images = (Image.fromarray(frame) for frame in frames)
    return "data:video/jpeg;base64," + ",".join(_encode(image, "JPEG") for image in images)


def _encode(image: Image.Image, file_format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def _landscape(index: int, width: int, height: int) -> np.ndarray:
    """Sky, hills and a field as uint8 `[height, width, 3]`, shifted by `DRIFT_PIXELS` per frame."""
    x = np.arange(width)[None, :] + DRIFT_PIXELS * index
    y = np.linspace(0.0, 1.0, height)[:, None]
    ridge = 0.45 + 0.12 * np.sin(x / 31.0) + 0.05 * np.sin(x / 11.0 + 1.0)
    sky = _blend((112, 160, 214), (226, 236, 246), y / np.maximum(ridge, 1e-3))
    furrows = 0.5 + 0.5 * np.sin(40.0 * y + x / 9.0)
    field = _blend(
        (74, 120, 66), (146, 168, 84), np.clip(0.7 * (y - ridge) * 2 + 0.3 * furrows, 0, 1)
    )
    return np.where((y < ridge)[..., None], sky, field).astype(np.uint8)


def _blend(
    dark: tuple[int, int, int], light: tuple[int, int, int], share: np.ndarray
) -> np.ndarray:
    """Colours between `dark` (share 0) and `light` (share 1), float `[height, width, 3]`."""
    share = np.clip(share, 0.0, 1.0)[..., None]
    return np.asarray(dark) * (1.0 - share) + np.asarray(light) * share


def _draw_sign(frame: Image.Image, text: str, left: int, top: int) -> None:
    draw = ImageDraw.Draw(frame)
    edge = CELL_PIXELS - 1
    draw.rectangle((left, top, left + edge, top + edge), fill=SIGN_COLOUR, outline=(255, 255, 255))
    font = ImageFont.load_default(size=CELL_PIXELS * 0.62)
    centre = (left + CELL_PIXELS / 2, top + CELL_PIXELS / 2)
    draw.text(centre, text, fill=(255, 255, 255), font=font, anchor="mm")
