"""Where a request's images and frames are, read from the engine's multimodal features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.spans import VisionItem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class FrameGrid:
    """Tokens of one frame and their arrangement, for reports: rows x columns = `frame_tokens`."""

    frame_tokens: int
    rows: int
    columns: int


def vision_items(features: Sequence[Any]) -> list[VisionItem]:
    """Vision tokens of a prompt, in order.

    Args:
        features: vLLM's `MultiModalFeatureSpec` of each item. Positions of an item that take no
            embedding (timestamps between frames) are text.
    """
    return [item for feature in features for item in _items_of(feature)]


def frame_records(features: Sequence[Any]) -> list[dict[str, Any]]:
    """Offset, length, tokens per frame and grid of every item, as plain data for the report."""
    records = []
    for feature in features:
        grid = frame_grid(feature)
        record = {"offset": feature.mm_position.offset, "length": feature.mm_position.length}
        record["tokens_per_frame"] = grid.frame_tokens if grid else record["length"]
        record["grid"] = [grid.rows, grid.columns] if grid else [1, record["tokens_per_frame"]]
        records.append(record)
    return records


def frame_grid(feature: Any) -> FrameGrid | None:
    """The frame of an item, from its `*_grid_thw` (frames, patch rows and columns), if it has one.

    Merged patches share a token: the square of the merge size is patches over tokens.
    """
    grid = _grid_thw(feature)
    if grid is None:
        return None
    num_frames, patch_rows, patch_columns = grid
    num_tokens = feature.mm_position.get_num_embeds()
    merge = round((num_frames * patch_rows * patch_columns / num_tokens) ** 0.5)
    rows, columns = patch_rows // merge, patch_columns // merge
    if num_frames * rows * columns != num_tokens:
        return None
    return FrameGrid(rows * columns, rows, columns)


def _grid_thw(feature: Any) -> tuple[int, int, int] | None:
    if feature.data is None:
        return None
    for key in feature.data:
        if key.endswith("grid_thw"):
            frames, rows, columns = feature.data[key].data.flatten().tolist()
            return frames, rows, columns
    return None


def _items_of(feature: Any) -> Iterator[VisionItem]:
    place = feature.mm_position
    grid = frame_grid(feature)
    if place.is_embed is None:
        frame_tokens = grid.frame_tokens if grid else None
        yield VisionItem(place.offset, place.length, feature.modality, frame_tokens)
        return
    for start, stop in place.extract_embeds_range():
        length = stop - start + 1
        frame_tokens = min(grid.frame_tokens, length) if grid else None
        yield VisionItem(start, length, feature.modality, frame_tokens)
