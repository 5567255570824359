"""Where images and frames are, read from vLLM's own descriptions of multimodal items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_budgetkv.cache.spans import PromptSpans, VisionItem
from vllm_budgetkv.cache.vision import (
    FrameGrid,
    frame_grid,
    frame_records,
    item_records,
    spans_of,
    vision_items,
)
from vllm_budgetkv.scheduler.connector import end_of_items

if TYPE_CHECKING:
    from typing import Any


def feature(
    offset: int,
    length: int,
    *,
    modality: str = "video",
    grid: Any = None,
    is_embed: torch.Tensor | None = None,
    has_data: bool = True,
) -> MultiModalFeatureSpec:
    elements = {"pixel_values": torch.zeros(1)}
    if grid is not None:
        elements[f"{modality}_grid_thw"] = torch.tensor(grid)
    data = MultiModalKwargsItem(
        {
            name: MultiModalFieldElem(data=tensor, field=MultiModalBatchedField())
            for name, tensor in elements.items()
        }
    )
    return MultiModalFeatureSpec(
        data=data if has_data else None,
        modality=modality,
        identifier=f"{modality}{offset}",
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=is_embed),
    )


def timestamped(frames: int, frame_tokens: int, stamp_tokens: int) -> torch.Tensor:
    """Mask of a video whose frames each stand behind a time stamp in text."""
    frame = torch.arange(stamp_tokens + frame_tokens) >= stamp_tokens
    return frame.repeat(frames)


@pytest.mark.parametrize(
    ("grid", "length", "expected"),
    [
        ((8, 4, 6), 8 * 2 * 3, FrameGrid(6, 2, 3)),
        ([(8, 4, 6)], 8 * 2 * 3, FrameGrid(6, 2, 3)),
        ([(1, 4, 6)] * 8, 8 * 2 * 3, FrameGrid(6, 2, 3)),
        ([(3, 4, 6), (1, 4, 6), (4, 4, 6)], 8 * 2 * 3, FrameGrid(6, 2, 3)),
        ([(1, 4, 6), (1, 6, 4)], 2 * 2 * 3, None),
        ((1, 28, 42), 14 * 21, FrameGrid(294, 14, 21)),
        ((5, 3, 7), 5 * 21, FrameGrid(21, 3, 7)),
        ((2, 9, 12), 2 * 3 * 4, FrameGrid(12, 3, 4)),
        ((8, 4, 6), 50, None),
        (None, 48, None),
    ],
    ids=[
        *("merge-2", "one-row", "row-a-frame", "rows", "rows-of-two-shapes"),
        *("image", "merge-1", "merge-3", "odd-length", "no-grid"),
    ],
)
def test_frame_grid(grid: Any, length: int, expected: FrameGrid | None) -> None:
    """A grid with a row for each frame ended the engine."""
    assert frame_grid(feature(3, length, grid=grid)) == expected


def test_a_grid_of_nested_lists() -> None:
    item = feature(3, 48, grid=(1, 1, 1))
    item.data["video_grid_thw"].data = [[torch.tensor([8.0, 4.0])], [[6]]]
    assert frame_grid(item) == FrameGrid(6, 2, 3)


def test_an_item_whose_data_stayed_in_the_front_end_has_no_grid() -> None:
    cached = feature(3, 48, grid=(8, 4, 6), has_data=False)
    assert frame_grid(cached) is None
    assert vision_items([cached]) == [VisionItem(3, 48, "video", None)]


def test_a_video_and_images_with_text_between() -> None:
    features = [
        feature(4, 48, grid=(8, 4, 6)),
        feature(60, 9, modality="image", grid=(1, 6, 6)),
        feature(80, 5, modality="audio"),
    ]
    assert vision_items(features) == [
        VisionItem(4, 48, "video", 6),
        VisionItem(60, 9, "image", 9),
        VisionItem(80, 5, "audio", None),
    ]


def test_timestamps_between_frames_are_text() -> None:
    item = feature(10, 3 * 8, grid=(3, 4, 6), is_embed=timestamped(3, 6, 2))
    items = vision_items([item])
    assert items == [VisionItem(start, 6, "video", 6) for start in (12, 20, 28)]
    spans = PromptSpans(40, items)
    _, is_vision = spans.lookup(torch.arange(40, dtype=torch.int32))
    expected = [p for s in (12, 20, 28) for p in range(s, s + 6)]
    assert is_vision.nonzero().flatten().tolist() == expected
    assert spans.trailing_frame_start(23) == 20, "the frame that is cut starts behind its stamp"


@pytest.mark.parametrize("closing", [0, 1, 3])
def test_marks_that_close_the_last_item_are_its_own(closing: int) -> None:
    """As for the scheduler, which counts the tokens up to the end of an item: the bug was a
    question one token longer here, so that what stays hung on who had computed the prompt."""
    mask = torch.cat((timestamped(2, 6, 2), torch.zeros(closing, dtype=torch.bool)))
    item = feature(10, len(mask), grid=(2, 4, 6), is_embed=mask)
    first = feature(0, 8, grid=(1, 4, 6), is_embed=torch.tensor([1] * 6 + [0] * 2).bool())
    spans = spans_of(40, [first, item])
    assert spans.end_of_vision == end_of_items([first, item]) == 26 + closing
    assert spans.vision_ranges[-1].stop == 26
    assert spans_of(40, []).end_of_vision == end_of_items([]) == 0


def test_records_of_items_tell_positions_and_frames_apart() -> None:
    stamped = feature(10, 3 * 8, grid=(3, 4, 6), is_embed=timestamped(3, 6, 2))
    sizes = feature(40, 2 * 6 + 4, grid=[(1, 4, 6), (1, 4, 6), (1, 4, 4)])
    plain = feature(60, 5, modality="image")
    unreadable = feature(70, 50, grid=(8, 4, 6))
    video, others, image, none = item_records([stamped, sizes, plain, unreadable])
    assert video["ranges"] == [[12, 18], [20, 26], [28, 34]] and video["runs"] == [[3, 2, 3]]
    assert others["ranges"] == [[40, 56]] and others["runs"] == [[2, 2, 3], [1, 2, 2]]
    assert image == {
        "modality": "image",
        "offset": 60,
        "length": 5,
        "ranges": [[60, 65]],
        "runs": [],
    }
    assert none["ranges"] == [[70, 120]] and none["runs"] == []


def test_a_mask_that_cuts_frames_into_pieces() -> None:
    """Rows with a separator behind each: a piece is shorter than the frame."""
    mask = torch.tensor([True, True, True, False] * 4)
    items = vision_items([feature(0, 16, grid=(2, 4, 6), is_embed=mask)])
    assert items == [VisionItem(start, 3, "video", 3) for start in (0, 4, 8, 12)]
    PromptSpans(16, items)


def test_two_frames_without_a_stamp_between_keep_their_length() -> None:
    mask = torch.tensor([False, *[True] * 12])
    items = vision_items([feature(5, 13, grid=(2, 4, 6), is_embed=mask)])
    assert items == [VisionItem(6, 12, "video", 6)]


SIZES = [(1, 8, 4), (2, 4, 2), (1, 8, 4)]  # frames of 8, 2, 2 and 8 tokens


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [(0, 8, 8), (8, 4, 2), (12, 8, 8)]),
        (
            [0, *[1] * 8, 0, 1, 1, 0, 1, 1, 0, *[1] * 8],
            [(1, 8, 8), (10, 2, 2), (13, 2, 2), (16, 8, 8)],
        ),
        ([0, *[1] * 9, 0, *[1] * 11], [(1, 8, 8), (9, 1, 1), (11, 3, 2), (14, 8, 8)]),
    ],
    ids=["in-one-piece", "behind-stamps", "cut-anywhere"],
)
def test_frames_of_two_sizes(mask: list[int] | None, expected: list[tuple[int, int, int]]) -> None:
    """Slow and fast frames, a row of the grid for each size."""
    is_embed = torch.tensor(mask).bool() if mask else None
    item = feature(0, len(mask or [0] * 20), grid=SIZES, is_embed=is_embed)
    items = [VisionItem(start, length, "video", frame) for start, length, frame in expected]
    assert vision_items([item]) == items
    assert spans_of(len(mask or [0] * 20) + 5, [item]).items == tuple(items)
    assert frame_records([item])[0]["grid"] == [1, item.mm_position.length]


def test_an_item_without_embeddings_is_text() -> None:
    mask = torch.zeros(6, dtype=torch.bool)
    assert vision_items([feature(2, 6, grid=(2, 4, 6), is_embed=mask)]) == []


def test_records_are_plain_data_for_the_report() -> None:
    features = [
        feature(4, 48, grid=(8, 4, 6)),
        feature(60, 9, modality="image"),
    ]
    assert frame_records(features) == [
        {"offset": 4, "length": 48, "tokens_per_frame": 6, "grid": [2, 3]},
        {"offset": 60, "length": 9, "tokens_per_frame": 9, "grid": [1, 9]},
    ]
