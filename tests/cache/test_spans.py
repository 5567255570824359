"""Spans, lookups and frames of prompts, against a list with one entry per token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_budgetkv.cache.spans import PromptSpans, VisionItem

VIDEO = VisionItem(5, 12, "video", 4)
IMAGE = VisionItem(20, 7, "image")
PROMPTS = {
    "text only": (10, []),
    "vision between text": (30, [VIDEO, IMAGE]),
    "unsorted": (30, [IMAGE, VIDEO]),
    "starts with vision": (12, [VisionItem(0, 6, "image")]),
    "ends with vision": (11, [VisionItem(5, 6, "image")]),
    "vision only": (6, [VisionItem(0, 6, "image")]),
    "neighbours": (20, [VisionItem(3, 6, "video", 4), VisionItem(9, 4, "image")]),
    "one token each": (5, [VisionItem(1, 1, "image"), VisionItem(3, 1, "image")]),
}


@st.composite
def prompts(draw: st.DrawFn) -> PromptSpans:
    items, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        position += draw(st.integers(0, 9))
        length = draw(st.integers(1, 20))
        frame = draw(st.none() | st.integers(1, length))
        modality = draw(st.sampled_from(["image", "video"]))
        items.append(VisionItem(position, length, modality, frame))
        position += length
    return PromptSpans(position + draw(st.integers(0, 9)), items)


def modalities(spans: PromptSpans, tokens: int) -> list[bool]:
    """True for vision, one entry per position."""
    vision = [False] * tokens
    for item in spans.items:
        vision[item.offset : item.stop] = [True] * item.length
    return vision


@pytest.mark.parametrize("name", PROMPTS)
def test_ranges(name: str) -> None:
    spans = PromptSpans(*PROMPTS[name])
    vision = modalities(spans, spans.prompt_tokens)
    ranges = spans.vision_ranges
    inside = [position for span in ranges for position in range(*span)]
    assert inside == [p for p, is_vision in enumerate(vision) if is_vision]
    assert all(a.stop < b.start for a, b in zip(ranges, ranges[1:], strict=False))
    assert spans.end_of_vision == max((p + 1 for p, v in enumerate(vision) if v), default=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_lookup(name: str) -> None:
    """An id changes exactly where the modality does; generated tokens are the last text."""
    spans = PromptSpans(*PROMPTS[name])
    tokens = spans.prompt_tokens + 5
    vision = modalities(spans, tokens)
    ids = [int(vision[0])]
    for before, here in zip(vision, vision[1:], strict=False):
        ids.append(ids[-1] + (before != here))
    shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).int()
    span_ids, is_vision = spans.lookup(shuffled.view(1, -1))
    assert span_ids.dtype == torch.int32
    assert span_ids[0].tolist() == [ids[p] for p in shuffled.tolist()]
    assert is_vision[0].tolist() == [vision[p] for p in shuffled.tolist()]
    not_held = spans.lookup(torch.tensor([-1], dtype=torch.int32))
    assert [tensor.tolist() for tensor in not_held] == [[0], [False]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(spans=prompts(), seen=st.integers(0, 120))
def test_counts(spans: PromptSpans, seen: int) -> None:
    span_ids, is_vision = spans.lookup(torch.arange(seen, dtype=torch.int32))
    counts = span_ids.bincount(minlength=2 * len(spans.vision_ranges) + 1)
    assert spans.span_tokens(seen).tolist() == counts.tolist()
    assert spans.count_text(seen) == seen - int(is_vision.sum())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    spans=prompts(), start=st.integers(0, 60), tokens=st.integers(0, 80), count=st.integers(0, 40)
)
def test_last_text_positions(spans: PromptSpans, start: int, tokens: int, count: int) -> None:
    stop = start + tokens
    vision = modalities(spans, max(stop, spans.prompt_tokens))
    text = [position for position in range(start, stop) if not vision[position]]
    expected = text[len(text) - min(count, len(text)) :]
    assert spans.last_text_positions(start, stop, count) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(spans=prompts())
def test_trailing_frame(spans: PromptSpans) -> None:
    starts = {}
    for item in spans.items:
        frame = item.frame_tokens or (item.length if item.modality == "image" else 1)
        for first in range(item.offset, item.stop, frame):
            for seen in range(first + 1, min(first + frame, item.stop)):
                starts[seen] = first
    for seen in range(spans.prompt_tokens + 5):
        assert spans.trailing_frame_start(seen) == starts.get(seen, seen)


def test_frames_of_a_video_and_an_image() -> None:
    spans = PromptSpans(30, [VIDEO, IMAGE])
    cuts = {4: 4, 5: 5, 6: 5, 8: 5, 9: 9, 12: 9, 16: 13, 17: 17, 20: 20, 21: 20, 26: 20, 27: 27}
    assert {seen: spans.trailing_frame_start(seen) for seen in cuts} == cuts


@pytest.mark.parametrize(
    ("prompt_tokens", "items", "message"),
    [
        (10, [VisionItem(5, 0, "image")], "image of 0 tokens at 5"),
        (10, [VisionItem(5, 6, "image")], "image of 6 tokens at 5 .* prompt has 10 tokens"),
        (10, [VisionItem(-1, 3, "image")], "image of 3 tokens at -1"),
        (20, [VIDEO, VisionItem(16, 2, "image")], "image of 2 tokens at 16 .* ends at 17"),
        (20, [VisionItem(1, 4, "video", 5)], "frame of 5 tokens"),
        (20, [VisionItem(1, 4, "video", 0)], "frame of 0 tokens"),
    ],
    ids=["empty", "beyond prompt", "negative", "overlap", "long frame", "empty frame"],
)
def test_bad_items(prompt_tokens: int, items: list[VisionItem], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSpans(prompt_tokens, items)


@pytest.mark.parametrize("name", PROMPTS)
def test_lookup_frames(name: str) -> None:
    """Frames are counted over the prompt; items with equally large frames share patch ids."""
    spans = PromptSpans(*PROMPTS[name])
    frame_ids, patch_ids = [-1] * (spans.prompt_tokens + 3), [0] * (spans.prompt_tokens + 3)
    first_patch: dict[int, int] = {}
    frame = -1
    for item in spans.items:
        size = item.frame_tokens or (item.length if item.modality == "image" else 1)
        first = first_patch.setdefault(size, sum(first_patch))
        for position in range(item.offset, item.stop):
            inside = position - item.offset
            frame += inside % size == 0
            frame_ids[position], patch_ids[position] = frame, first + inside % size
    positions = torch.tensor([-1, *range(len(frame_ids))], dtype=torch.int32)
    found = spans.lookup_frames(positions)
    assert [tensor.tolist() for tensor in found] == [[-1, *frame_ids], [0, *patch_ids]]
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.int32]
    assert max(patch_ids) < spans.num_patches


def test_frames_of_one_size_share_patches_and_others_do_not() -> None:
    items = [VisionItem(0, 8, "video", 4), VisionItem(9, 4, "image"), VisionItem(14, 6, "image")]
    spans = PromptSpans(30, items)
    frame_ids, patch_ids = spans.lookup_frames(torch.arange(20, dtype=torch.int32))
    assert frame_ids.tolist() == [*[0] * 4, *[1] * 4, -1, *[2] * 4, -1, *[3] * 6]
    assert patch_ids.tolist() == [*range(4), *range(4), 0, *range(4), 0, *range(4, 10)]
    assert spans.num_patches == 10
