"""Where a request's images and frames are, read from the engine's multimodal features.

Features are what a model's processor made of a client's input, and a request must not end the
engine, so nothing here trusts them: what cannot be read is an item without frames, or text, and the
log says so once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_budgetkv.cache.notices import warn_once
from vllm_budgetkv.cache.spans import PromptSpans, VisionItem, fit_items

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# all that reading an object of another shape than expected can raise
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class FrameGrid:
    """Tokens of one frame and their arrangement, for reports: rows x columns = `frame_tokens`."""

    frame_tokens: int
    rows: int
    columns: int


class FrameRun(NamedTuple):
    """Frames of equal size that follow one another in an item."""

    grid: FrameGrid
    num_frames: int


class Place(NamedTuple):
    """Where an item stands: `ranges` are the positions, from the first to before the last, that
    take an embedding. What stands between them (timestamps of frames) is text."""

    offset: int
    length: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_embeds(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def spans_of(
    prompt_tokens: int, features: Sequence[Any], device: torch.device | str = "cpu"
) -> PromptSpans:
    """Text and vision of a prompt, whatever its features say. Arguments: see `PromptSpans`."""
    items = sorted(vision_items(features), key=lambda item: item.offset)
    fitting = fit_items(prompt_tokens, items)
    if fitting != items:
        warn_once("items of a prompt overlap or reach beyond it: they were cut to what fits")
    return PromptSpans(prompt_tokens, fitting, device, _closing(prompt_tokens, fitting, features))


def _closing(prompt_tokens: int, items: Sequence[VisionItem], features: Sequence[Any]) -> int:
    """Tokens of the last item behind its last embedding: a mark that closes it, mostly."""
    places = [place for feature in features if (place := _place_of(feature)) and place.ranges]
    stop = min(prompt_tokens, max((p.offset + p.length for p in places), default=0))
    return max(0, stop - items[-1].stop) if items else 0


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
        place = _place_of(feature)
        if place is None:
            continue
        grid = frame_grid(feature)
        record: dict[str, Any] = {"offset": place.offset, "length": place.length}
        record["tokens_per_frame"] = grid.frame_tokens if grid else record["length"]
        record["grid"] = [grid.rows, grid.columns] if grid else [1, record["tokens_per_frame"]]
        records.append(record)
    return records


def item_records(features: Sequence[Any]) -> list[dict[str, Any]]:
    """What each item is and where its frames are, as plain data for the trace.

    Returns:
        Of each `modality`, `offset` and `length`; `ranges` [first, behind the last] of positions
        that take an embedding; and `runs` [frames, rows, columns] that fill these in order, none
        where the item has no frames or they cannot be read.
    """
    records = []
    for feature in features:
        place = _place_of(feature)
        if place is None:
            continue
        runs = _frame_runs(feature, place)
        records.append(
            {
                "modality": _modality(feature),
                "offset": place.offset,
                "length": place.length,
                "ranges": [list(one) for one in place.ranges],
                "runs": [[run.num_frames, run.grid.rows, run.grid.columns] for run in runs],
            }
        )
    return records


def frame_grid(feature: Any) -> FrameGrid | None:
    """The frame of an item whose frames are all equal, if it has any."""
    place = _place_of(feature)
    runs = _frame_runs(feature, place) if place else []
    return runs[0].grid if len(runs) == 1 else None


def _items_of(feature: Any) -> Iterator[VisionItem]:
    place = _place_of(feature)
    if place is None:
        return
    modality, runs = _modality(feature), _frame_runs(feature, place)
    if not runs:
        yield from (VisionItem(start, stop - start, modality) for start, stop in place.ranges)
        return
    # frames of another size are an item of their own, since an item has frames of one size
    left = [(run.grid.frame_tokens, run.num_frames * run.grid.frame_tokens) for run in runs[::-1]]
    for start, stop in place.ranges:
        while start < stop:
            frame_tokens, run_tokens = left.pop()
            length = min(stop - start, run_tokens)
            yield VisionItem(start, length, modality, min(frame_tokens, length))
            start += length
            if length < run_tokens:
                left.append((frame_tokens, run_tokens - length))


def _modality(feature: Any) -> str:
    try:
        return str(feature.modality)
    except UNREADABLE:
        return "item"


def _place_of(feature: Any) -> Place | None:
    """None, so that it is text, for an item whose place cannot be read."""
    try:
        offset, length = index(feature.mm_position.offset), index(feature.mm_position.length)
    except UNREADABLE:
        warn_once(f"where a {_modality(feature)} stands in its prompt cannot be read: it is text")
        return None
    try:
        return Place(offset, length, _embed_ranges(feature.mm_position.is_embed, offset, length))
    except UNREADABLE:
        warn_once(f"which tokens of a {_modality(feature)} are seen cannot be read: all are vision")
        return Place(offset, length, ((offset, offset + length),) if length > 0 else ())


def _embed_ranges(mask: Any, offset: int, length: int) -> tuple[tuple[int, int], ...]:
    if mask is None:
        return ((offset, offset + length),) if length > 0 else ()
    if mask.numel() != length:
        raise ValueError(f"a mask of {mask.numel()} tokens for an item of {length}")
    edges = torch.zeros(length + 2, dtype=torch.int8)
    edges[1:-1] = mask.flatten() != 0
    found = (edges.diff().nonzero().flatten() + offset).tolist()
    return tuple(zip(found[::2], found[1::2], strict=True))


def _frame_runs(feature: Any, place: Place) -> list[FrameRun]:
    """The frames of an item, from its `*_grid_thw`; none without one, or if it cannot be read.

    A grid has a row (frames, patch rows, patch columns) for the item or, in models whose frames
    differ in size, for each frame. Merged patches share a token: the square of the merge size is
    patches over tokens.
    """
    try:
        rows = _grid_rows(feature, 3 * place.num_embeds) if place.ranges else []
        if not rows:
            return []
        num_patches = sum(frames * height * width for frames, height, width in rows)
        merge = round((num_patches / place.num_embeds) ** 0.5)
        runs = []
        for (height, width), equal in groupby(rows, key=lambda row: row[1:]):
            num_frames = sum(frames for frames, _, _ in equal)
            shape = (height // merge, width // merge)
            runs.append(FrameRun(FrameGrid(shape[0] * shape[1], *shape), num_frames))
        num_tokens = sum(run.num_frames * run.grid.frame_tokens for run in runs)
        if num_tokens != place.num_embeds or min(run.grid.frame_tokens for run in runs) < 1:
            raise ValueError(f"frames of {num_tokens} tokens for {place.num_embeds} embeddings")
    except UNREADABLE:
        warn_once(f"the frames of a {_modality(feature)} cannot be read from its grid: it has none")
        return []
    return runs


def _grid_rows(feature: Any, most_numbers: int) -> list[tuple[int, int, int]]:
    if feature.data is None:
        # it stayed in the front end
        return []
    names = [name for name in feature.data if str(name).endswith("grid_thw")]
    if not names:
        return []
    own_name = f"{_modality(feature)}_grid_thw"
    grid = feature.data[own_name if own_name in names else names[0]].data
    numbers = _numbers(grid, most_numbers)
    if len(numbers) % 3 or not numbers or min(numbers) < 1:
        raise ValueError(f"a grid of {len(numbers)} numbers from {min(numbers, default=0)}")
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _numbers(value: Any, most: int) -> list[int]:
    """Whole numbers of a tensor, an array or nested lists of them, in order."""
    if isinstance(value, torch.Tensor) and value.numel() > most:
        raise ValueError(f"{value.numel()} numbers for {most // 3} tokens")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part, most)]
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is no whole number")
    return [number]
