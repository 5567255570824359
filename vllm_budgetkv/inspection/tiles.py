"""Frames whose kept patches are lit, as small pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.inspection.story import HeadClass, Item

# what a patch that no head kept still shows of itself, so that one sees where one is
UNLIT = 0.2
# shares are small: half of the light is reached at a quarter of the largest
GAMMA = 0.5
MOST_FRAMES = 24
SMALL_PIXELS, LARGE_PIXELS = 168, 520
JPEG_QUALITY = 82
GREY = (150, 150, 150)


@dataclass(frozen=True)
class Tile:
    """One frame, for one class of heads.

    Args:
        frame: its number in the item, from 0.
        source: number of the picture that it shows; None for none.
        kept_ratio: the mean share of the heads that kept a patch of it.
        picture: RGB.
    """

    frame: int
    source: int | None
    kept_ratio: float
    picture: Image.Image


def frame_shares(item: Item, heads: HeadClass) -> list[np.ndarray]:
    """The share of heads that kept each patch, of every frame, float64 [rows, columns]."""
    return [heads.share[positions] for positions in item.frame_positions]


def chosen_frames(item: Item, share: np.ndarray, most: int = MOST_FRAMES) -> list[int]:
    """Frames that are shown: all, or half of `most` evenly spread and those that kept most.

    Args:
        item: the video.
        share: float64 [P], by which frames are compared.
        most: how many.
    """
    means = np.array([share[positions].mean() for positions in item.frame_positions])
    if means.size <= most:
        return list(range(means.size))
    chosen = set(np.linspace(0, means.size - 1, most // 2).round().astype(int).tolist())
    for frame in np.argsort(-means, kind="stable").tolist():
        if len(chosen) == most:
            break
        chosen.add(frame)
    return sorted(chosen)


def source_of(frame: int, num_frames: int, num_pictures: int) -> int:
    """Number of the picture that a frame was made of; a model may merge neighbours into one."""
    return min(num_pictures - 1, frame * num_pictures // num_frames)


def tiles_of(
    item: Item,
    heads: HeadClass,
    frames: Sequence[int],
    pictures: Sequence[Image.Image],
    brightest: float,
    pixels: int = SMALL_PIXELS,
) -> list[Tile]:
    """Frames of an item, lit by what the heads of one class kept.

    Args:
        item: the picture or video; its frames are known.
        heads: the class.
        frames: which frames.
        pictures: what the client sent of the item; none if it is not at hand.
        brightest: the share that is shown in full light.
        pixels: longest edge of a tile.
    """
    shares = frame_shares(item, heads)
    found = []
    for frame in frames:
        source = source_of(frame, len(shares), len(pictures)) if pictures else None
        base = _blank(shares[frame]) if source is None else pictures[source].convert("RGB")
        base = base.copy()
        base.thumbnail((pixels, pixels))
        lit = lit_picture(base, shares[frame], brightest)
        found.append(Tile(frame, source, float(shares[frame].mean()), lit))
    return found


def light_of(share: np.ndarray, brightest: float) -> np.ndarray:
    """How bright a share is shown, from `UNLIT` to 1."""
    return UNLIT + (1 - UNLIT) * np.clip(share / max(brightest, 1e-9), 0, 1) ** GAMMA


def lit_picture(picture: Image.Image, share: np.ndarray, brightest: float) -> Image.Image:
    """The picture, dark and grey where no head kept the patch, as it is where most did.

    Args:
        picture: RGB.
        share: float64 [rows, columns], of the heads that kept each patch; patches divide the
            picture evenly.
        brightest: the share that is shown in full light.
    """
    light = Image.fromarray(light_of(share, brightest).astype(np.float32))
    wide = np.asarray(light.resize(picture.size, Image.Resampling.NEAREST))[..., None]
    colour = np.asarray(picture, dtype=np.float32)
    grey = np.repeat(np.asarray(picture.convert("L"), dtype=np.float32)[..., None], 3, axis=-1)
    full = (wide - UNLIT) / (1 - UNLIT)
    mixed = wide * (full * colour + (1 - full) * grey)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _blank(share: np.ndarray) -> Image.Image:
    """In place of a frame that is not at hand; 14 pixels a patch."""
    rows, columns = share.shape
    return Image.new("RGB", (14 * columns, 14 * rows), GREY)


def jpeg_url(picture: Image.Image) -> str:
    return _data_url(picture, "JPEG", quality=JPEG_QUALITY)


def png_url(picture: Image.Image) -> str:
    return _data_url(picture, "PNG", optimize=True)


def _data_url(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
