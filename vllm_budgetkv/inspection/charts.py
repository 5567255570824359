"""Numbers as paths of inline SVG, which the page stretches to its width, and as rows of pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from vllm_budgetkv.inspection.story import Story

# of a drawing; the page gives it any size
WIDTH, HEIGHT = 1000.0, 100.0
MOST_BINS = 320
STATIC_RGB, DYNAMIC_RGB = (47, 109, 179), (178, 84, 16)


def binned(values: np.ndarray, most: int = MOST_BINS) -> np.ndarray:
    """Means of neighbours, float64, at most `most` of them, each of equally many but for one."""
    if values.size <= most:
        return values.astype(np.float64)
    edges = np.linspace(0, values.size, most + 1).round().astype(int)
    return np.add.reduceat(values.astype(np.float64), edges[:-1]) / np.diff(edges)


def area_path(values: np.ndarray, top: float) -> str:
    """A filled staircase over equally wide bins; `top` is the value at the upper edge."""
    step = WIDTH / max(1, values.size)
    parts = [f"M0 {HEIGHT:g}"]
    for index, value in enumerate(values.tolist()):
        parts.append(f"V{_y(value, top)}H{(index + 1) * step:.1f}")
    return "".join([*parts, f"V{HEIGHT:g}Z"])


def step_path(x: np.ndarray, y: np.ndarray, end: float, top: float, *, filled: bool) -> str:
    """A staircase that has each value until the next place.

    Args:
        x: float64 [n], ascending.
        y: float64 [n].
        end: where the right edge is.
        top: the value at the upper edge; beyond it the line runs along there.
        filled: whether the area below it is closed.
    """
    places = [f"{_x(one, end)}" for one in x.tolist()]
    heights = [_y(one, top) for one in y.tolist()]
    if not places:
        return ""
    start = f"M{places[0]} {HEIGHT:g}V{heights[0]}" if filled else f"M{places[0]} {heights[0]}"
    parts = [start]
    for place, height in zip(places[1:], heights[1:], strict=True):
        parts.append(f"H{place}V{height}")
    return "".join([*parts, f"H{WIDTH:g}", f"V{HEIGHT:g}Z" if filled else ""])


def _x(value: float, end: float) -> str:
    return f"{WIDTH * min(value / end, 1):.1f}" if end > 0 else "0"


def _y(value: float, top: float) -> str:
    return f"{HEIGHT * (1 - min(value / top, 1)):.1f}" if top > 0 else f"{HEIGHT:g}"


def zones(flags: np.ndarray) -> list[tuple[float, float]]:
    """Left edge and width, per cent, of where most of each bin is True."""
    most = binned(flags) > 0.5
    edges = np.flatnonzero(np.diff(np.concatenate(([False], most, [False])).astype(int)))
    scale = 100.0 / max(1, most.size)
    return [(a * scale, (b - a) * scale) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def class_rows(story: Story) -> Image.Image:
    """A row for each head, layer by layer, a column for each compression: by its class."""
    history = story.class_history.reshape(len(story.class_history), -1).T
    colours = np.where(history[..., None], STATIC_RGB, DYNAMIC_RGB).astype(np.uint8)
    return Image.fromarray(colours)


def kept_rows(story: Story, most: int = MOST_BINS) -> Image.Image | None:
    """A row for each head, a column for each bin of the prompt; as opaque as much was kept there.

    RGBA. None where the trace does not say it.
    """
    if story.kept is None:
        return None
    of_heads = story.kept.reshape(-1, story.prompt_tokens)
    shares = np.stack([binned(row, most) for row in of_heads])
    opacity = np.sqrt(shares) * 255
    is_static = story.is_static.reshape(-1, 1, 1)
    colours = np.where(is_static, STATIC_RGB, DYNAMIC_RGB)
    colours = np.broadcast_to(colours, (*shares.shape, 3))
    rows = np.concatenate((colours, opacity[..., None].round()), axis=-1)
    return Image.fromarray(rows.astype(np.uint8), "RGBA")
