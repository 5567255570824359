"""The page: one HTML file that needs nothing beside itself, from a story and a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_budgetkv import __version__
from vllm_budgetkv.inspection import charts, tiles
from vllm_budgetkv.inspection.labels import brightest, labels_of, share_text
from vllm_budgetkv.inspection.numbers import numbers_of
from vllm_budgetkv.inspection.words import pieces_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from vllm_budgetkv.inspection.conversation import Conversation
    from vllm_budgetkv.inspection.story import HeadClass, Item, Story
    from vllm_budgetkv.inspection.words import Piece

LEVELS = 8
# items that are shown with pictures; of all, the numbers count
MOST_ITEMS = 12
# tiles of a page, for each class of heads
MOST_TILES = 48
# where there are no more, they are shown large
FEW_TILES = 4
# a table of them is shown folded beyond it
MANY_HEADS = 64
HEADS_PIXELS, MOST_ROW_PIXELS, LABEL_PIXELS = 420, 16, 15


def render(story: Story, conversation: Conversation) -> str:
    """The page as HTML; the template escapes all text of the prompt, of the model and of names."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vllm_budgetkv.inspection", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = share_text
    return environment.get_template("page.html").render(**context(story, conversation))


def context(story: Story, conversation: Conversation) -> dict[str, Any]:
    """All that the template shows."""
    numbers = numbers_of(story)
    shown = [item for item in story.items if item.positions.size][:MOST_ITEMS]
    return {
        "version": __version__,
        "conversation": conversation,
        "record": story.record,
        "story": story,
        "numbers": numbers,
        # within a script element, where entities mean nothing
        "numbers_json": json.dumps(numbers).replace("<", "\\u003c"),
        "labels": labels_of(story),
        "items": list(_items(story, conversation, shown)) if story.classes else [],
        "num_items": len(story.items),
        "brightest": brightest(story),
        "words": [_word(story, piece) for piece in pieces_of(story, conversation.decode)],
        "prompt": _prompt_chart(story),
        "blocks": _blocks_chart(story) if len(story.steps) else None,
        "heads": _heads(story) if story.is_read else None,
    }


# --- pictures and videos ------------------------------------------------------------------------


@dataclass(frozen=True)
class TileRow:
    """The frames of an item for one class of heads.

    Args:
        heads: the class.
        kept_ratio: the mean share of its heads that kept a token of the item.
        tiles: address, words and caption of each picture.
        bars: a path over all frames or tokens.
        most: the value at the upper edge of `bars`.
    """

    heads: HeadClass
    kept_ratio: float
    tiles: list[dict[str, str]]
    bars: str
    most: float


def _items(story: Story, conversation: Conversation, shown: list[Item]) -> Iterator[dict[str, Any]]:
    most = max(1, min(tiles.MOST_FRAMES, MOST_TILES // max(1, len(shown))))
    for item in shown:
        pictures = conversation.pictures_of(item)
        frames = tiles.chosen_frames(item, story.share, most) if item.num_frames else []
        is_large = len(shown) * len(frames) <= FEW_TILES
        yield {
            "item": item,
            "rows": list(_rows(story, item, frames, pictures, is_large)),
            "num_shown": len(frames),
            "num_pictures": len(pictures),
            "is_large": is_large,
            "plain": _plain(pictures[0]) if pictures and not frames else None,
            "grids": _grids(item),
        }


def _rows(
    story: Story,
    item: Item,
    frames: Sequence[int],
    pictures: Sequence[Image.Image],
    is_large: bool,
) -> Iterator[TileRow]:
    """One for each class of heads; their bars have one scale."""
    pixels = tiles.LARGE_PIXELS if is_large else tiles.SMALL_PIXELS
    top = max((_of_frames(item, one).max() for one in story.classes), default=0.0)
    for one in story.classes:
        lit = tiles.tiles_of(item, one, frames, pictures, brightest(story), pixels)
        yield TileRow(
            one,
            float(one.share[item.positions].mean()),
            [_tile(item, tile, one) for tile in lit],
            charts.area_path(charts.binned(_of_frames(item, one)), top),
            float(top),
        )


def _plain(picture: Image.Image) -> str:
    """A picture as it was sent, as an address."""
    small = picture.convert("RGB").copy()
    small.thumbnail((tiles.LARGE_PIXELS, tiles.LARGE_PIXELS))
    return tiles.jpeg_url(small)


def _of_frames(item: Item, heads: HeadClass) -> np.ndarray:
    """The share that was kept of each frame; of each token where no frame is known."""
    if not item.num_frames:
        return heads.share[item.positions]
    return np.array([share.mean() for share in tiles.frame_shares(item, heads)])


def _tile(item: Item, tile: tiles.Tile, heads: HeadClass) -> dict[str, str]:
    name = item.name if item.num_frames == 1 else f"{item.name}, frame {tile.frame + 1}"
    label = "" if item.num_frames == 1 else f"{tile.frame + 1} · "
    kept = share_text(tile.kept_ratio)
    return {
        "url": tiles.jpeg_url(tile.picture),
        "alt": f"{name}: {heads.name} heads kept {kept} of its patches",
        "caption": f"{label}{kept}",
    }


def _grids(item: Item) -> str:
    """How the patches of a frame stand, in words."""
    shapes = sorted({(rows, columns) for _, rows, columns in item.runs})
    if len(shapes) == 1:
        return f"{shapes[0][0]} × {shapes[0][1]} patches each"
    return f"{len(shapes)} sizes of frames"


# --- words --------------------------------------------------------------------------------------


def _word(story: Story, piece: Piece) -> dict[str, Any]:
    """A piece and what was kept of it, as the template marks it."""
    shares = {one.name: float(one.share[piece.start : piece.stop].mean()) for one in story.classes}
    levels = {name: int(np.ceil(LEVELS * share - 1e-9)) for name, share in shares.items()}
    return {
        "kind": piece.kind,
        # a line break shows where it stands, and breaks the line
        "text": piece.text.replace("\n", "↵\n"),
        "num_tokens": piece.stop - piece.start,
        "place": f"{piece.start:,}"
        if piece.stop == piece.start + 1
        else f"{piece.start:,}–{piece.stop - 1:,}",
        "shares": shares,
        "marks": " ".join(f"{name[0]}{level}" for name, level in levels.items() if level),
        "is_gone": bool(levels) and not any(levels.values()),
    }


# --- charts -------------------------------------------------------------------------------------


def _prompt_chart(story: Story) -> dict[str, Any]:
    return {
        "areas": {
            one.name: charts.area_path(charts.binned(one.share), 1.0) for one in story.classes
        },
        "text_zones": charts.zones(~story.is_vision),
        "ticks": [
            (100 * place, f"{round(place * story.prompt_tokens):,}")
            for place in (0, 0.25, 0.5, 0.75, 1)
        ],
        "num_bins": min(charts.MOST_BINS, story.prompt_tokens),
    }


def _blocks_chart(story: Story) -> dict[str, Any]:
    """Blocks over time. The full cache leaves the drawing where it would hold far more."""
    seconds, seen, held = story.steps[:, 0], story.steps[:, 1], story.steps[:, 2]
    end = float(seconds[-1]) or 1.0
    full = np.ceil(seen / story.record["block_tokens"])
    quota = float(story.record["quota_blocks"]) if story.has_quota else 0.0
    top = max(1.0, float(held.max()), quota) * 1.25
    if full.max() <= 2 * top:
        top = max(top, float(full.max()) * 1.05)
    moments = [(100 * place, _moment(story, place * end)) for place in (0, 0.25, 0.5, 0.75, 1)]
    prompt = story.prompt_seconds
    return {
        "held": charts.step_path(seconds, held, end, top, filled=True),
        "used": charts.step_path(seconds, story.num_pages, end, top, filled=True),
        "full": charts.step_path(seconds, full, end, top, filled=False),
        "quota_percent": 100 * (1 - quota / top) if quota else None,
        "leaves": bool(full.max() > top),
        "full_blocks": int(full.max()),
        "scale": [(100 * (1 - value / top), f"{value:,.0f}") for value in _scale(top, quota)],
        "ticks": moments,
        "prompt_percent": 100 * prompt / end if np.isfinite(prompt) else None,
    }


def _scale(top: float, quota: float) -> list[float]:
    """Blocks that have a label: none, the quota or the most, and half of it."""
    most = quota or top / 1.25
    return [0.0, most / 2, most] if most >= 4 else [0.0, most]


def _moment(story: Story, seconds: float) -> tuple[str, str]:
    """A time and the tokens that had been seen then."""
    index = int(np.searchsorted(story.steps[:, 0], seconds + 1e-9)) - 1
    seen = int(story.steps[max(0, index), 1]) if index >= 0 else 0
    return f"{seconds:.2f} s", f"{seen:,} tokens"


def _heads(story: Story) -> dict[str, Any]:
    """Rows of all heads, as pictures of a pixel each, and a table."""
    num_layers, num_heads = story.shape
    row_pixels = max(1, min(MOST_ROW_PIXELS, HEADS_PIXELS // story.num_all_heads))
    every = max(1, -(-LABEL_PIXELS // (row_pixels * num_heads)))
    kept = charts.kept_rows(story)
    history = story.trace["classes"]
    return {
        "height": row_pixels * story.num_all_heads,
        "layers": [
            (100 * layer / num_layers, 100 / num_layers, layer if layer % every == 0 else None)
            for layer in range(num_layers)
        ],
        "classes": tiles.png_url(charts.class_rows(story)) if history else None,
        "kept": None if kept is None else tiles.png_url(kept),
        "compressions": [(entry[1], entry[0]) for entry in (history[:1] + history[-1:])],
        "stride": story.trace["class_stride"],
        "is_folded": story.num_all_heads > MANY_HEADS,
        "table": [
            [
                {
                    "is_static": bool(story.is_static[layer, head]),
                    "tokens": int(story.held_tokens[layer, head]),
                    "changes": int(story.class_changes[layer, head]),
                }
                for head in range(num_heads)
            ]
            for layer in range(num_layers)
        ],
    }
