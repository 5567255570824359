"""Whatever a model reports of its items, a request gets vision items or none, never an error."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.client import Client
from tests.cache.lab import Lab
from tests.cache.test_vision import feature
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache import notices
from vllm_budgetkv.cache.spans import PromptSpans, VisionItem, fit_items
from vllm_budgetkv.cache.vision import frame_grid, frame_records, spans_of, vision_items
from vllm_budgetkv.scheduler.chunks import EncoderLimits, chunk_stop

PROMPT_TOKENS = 60
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.complex64]
SHAPES = [(), (0,), (3,), (1, 3), (4, 3), (0, 3), (2, 2), (1, 2, 3), (7,), (10**6, 3)]
DEVICES = ["cpu"] * 9 + ["meta"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.sampled_from(SHAPES))
    values = torch.tensor(draw(st.integers(0, 9))).expand(shape)
    return values.to(draw(st.sampled_from(DEVICES)), draw(st.sampled_from(DTYPES)))


ATOMS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([10**6, 2**63 - 1, -(2**63), 10**400]),
    *(st.floats(), st.booleans(), st.none(), st.text(max_size=2), st.binary(max_size=2)),
    *(tensors(), tensors().map(lambda t: t.numpy() if t.device.type == "cpu" else t)),
)
ANYTHING = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
ROWS = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=4)
GRIDS = st.one_of(
    ANYTHING,
    ROWS,
    ROWS.map(torch.tensor),
    ROWS.map(lambda rows: torch.tensor(rows, dtype=torch.float32)),
    ROWS.map(lambda rows: [torch.tensor(row) for row in rows]),
)
MASKS = st.none() | st.lists(st.booleans(), max_size=30).map(torch.tensor)


def things(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with any of these attributes, or no such object at all."""
    return ANYTHING | st.fixed_dictionaries({}, optional=fields).map(
        lambda found: SimpleNamespace(**found)
    )


NAMES = ["video_grid_thw", "image_grid_thw", "audio_grid_thw", "pixel_values", 7]
DATA = ANYTHING | st.dictionaries(st.sampled_from(NAMES), things(data=GRIDS), max_size=3)
PLACES = things(
    offset=st.integers(-9, PROMPT_TOKENS + 9) | ANYTHING,
    length=st.integers(-9, PROMPT_TOKENS + 9) | ANYTHING,
    is_embed=MASKS | ANYTHING,
)
FEATURES = things(
    data=DATA, mm_position=PLACES, modality=st.sampled_from(["image", "video"]) | ANYTHING
)
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


def vision_positions(spans: PromptSpans) -> list[int]:
    return [position for span in spans.vision_ranges for position in range(*span)]


@PROPERTY
@given(features=st.lists(FEATURES, max_size=3), prompt_tokens=st.integers(1, PROMPT_TOKENS))
def test_anything_gives_items_or_none(features: list[Any], prompt_tokens: int) -> None:
    spans = spans_of(prompt_tokens, features)
    positions = torch.arange(prompt_tokens + 3, dtype=torch.int32)
    frame_ids, patch_ids = spans.lookup_frames(positions)
    assert (patch_ids < spans.num_patches).all()
    assert (frame_ids >= 0).nonzero().flatten().tolist() == vision_positions(spans)
    for record in json.loads(json.dumps(frame_records(features))):
        assert record["grid"][0] * record["grid"][1] == record["tokens_per_frame"]


@PROPERTY
@given(data=DATA, mask=st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_grid_changes_no_position(data: Any, mask: list[bool]) -> None:
    item = feature(3, 12, is_embed=torch.tensor(mask))
    item.data = data
    expected = [3 + place for place, is_seen in enumerate(mask) if is_seen]
    assert vision_positions(spans_of(20, [item])) == expected


@PROPERTY
@given(
    prompt_tokens=st.integers(0, 30),
    items=st.lists(
        st.builds(
            VisionItem,
            st.integers(-9, 40),
            st.integers(-9, 40),
            st.just("video"),
            st.none() | st.integers(-3, 50),
        )
    ),
)
def test_items_that_overlap_or_reach_beyond_the_prompt(
    prompt_tokens: int, items: list[VisionItem]
) -> None:
    items.sort(key=lambda item: item.offset)
    spans = PromptSpans(prompt_tokens, fit_items(prompt_tokens, items))
    wanted = {position for item in items for position in range(item.offset, item.stop)}
    assert vision_positions(spans) == sorted(wanted & set(range(prompt_tokens)))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([(5, 20, 4)], [(5, 20, 4)]),
        ([(20, 15, 4)], [(20, 10, 4)]),
        ([(28, 15, 4)], [(28, 2, 2)]),
        ([(5, 10, 4), (12, 10, 5)], [(5, 10, 4), (15, 7, None)]),
        ([(5, 20, 4), (8, 6, 2)], [(5, 20, 4)]),
        ([(30, 5, 1), (-3, 5, 2), (4, 0, 1)], [(0, 2, None)]),
    ],
    ids=["fits", "too-long", "cut-in-a-frame", "overlap", "nested", "outside"],
)
def test_fit_items(items: list[tuple], expected: list[tuple]) -> None:
    found = fit_items(30, [VisionItem(o, n, "video", frame) for o, n, frame in items])
    assert [(item.offset, item.length, item.frame_tokens) for item in found] == expected


GRIDS_OF_NOTHING = {
    "zeros": torch.zeros(1, 3, dtype=torch.int64),
    "negative": torch.tensor([-2, -4, 6]),
    "frames that cancel": torch.tensor([[-2, 4, 6], [4, 4, 6]]),
    "empty": torch.empty(0, 3),
    "two numbers": torch.tensor([4, 6]),
    "fractions": torch.tensor([1.5, 4.0, 8.0]),
    "no numbers": torch.tensor([float("nan")] * 3),
    "huge": torch.tensor([2**62, 2**62, 2**62]),
    "endless": torch.tensor(1).expand(10**12, 3),
    "text": "8x4x6",
    "missing": None,
    "nested": [[torch.tensor([8, 4])], [{6: 6}]],
    "fewer patches than tokens": torch.tensor([1, 1, 1]),
}


@pytest.mark.parametrize("name", GRIDS_OF_NOTHING)
def test_a_grid_that_says_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frames, said once. All but the huge and the fractional one ended the engine."""
    said: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", lambda text, *args: said.append(text % args))
    notices.warn_once.cache_clear()
    item = feature(4, 48)
    item.data["video_grid_thw"] = SimpleNamespace(data=GRIDS_OF_NOTHING[name])
    for _ in range(2):
        assert vision_items([item]) == [VisionItem(4, 48, "video", None)]
        assert frame_grid(item) is None
    assert frame_records([item]) == [
        {"offset": 4, "length": 48, "tokens_per_frame": 48, "grid": [1, 48]}
    ]
    (line,) = said
    assert "the frames of a video cannot be read from its grid" in line


UNFIT = {
    "a row for each frame": [feature(5, 40, grid=[(1, 4, 4)] * 10)],
    "no grid to read": [feature(5, 40, grid=(0, 0, 0))],
    "overlapping": [feature(5, 40, grid=(10, 4, 4)), feature(20, 40, grid=(10, 4, 4))],
    "beyond the prompt": [feature(50, 400, grid=(100, 4, 4))],
    "a mask of another length": [feature(5, 40, is_embed=torch.ones(90).bool())],
}


@pytest.mark.parametrize("name", UNFIT)
def test_the_worker_serves_the_request(name: str) -> None:
    """Every step of a real cache, of a prompt that must be compressed, down to its record."""
    quota = Quota(blocks=9, page_tokens=8, num_layers=2, chunk_tokens=20, decode_interval_tokens=4)
    lab, client = Lab("infinipot-v", quota, pool_blocks=20), Client("r", 100, UNFIT[name])
    while client.output_tokens < 1:
        lab.step({client: min(20, client.total_tokens - client.computed_tokens)})
    lab.step({}, finished=("r",))
    (record,) = lab.finished
    assert record.compressions and len(record.frames) == len(UNFIT[name])


@pytest.mark.parametrize("embeds", [8, 10**6], ids=["small encoder", "large encoder"])
@pytest.mark.parametrize("name", UNFIT)
def test_the_scheduler_cuts_its_chunks(name: str, embeds: int) -> None:
    quota = Quota(blocks=9, page_tokens=8, num_layers=2, chunk_tokens=20, decode_interval_tokens=4)
    request: Any = SimpleNamespace(num_prompt_tokens=100, mm_features=UNFIT[name])
    limits = EncoderLimits(embeds=embeds, keeps_items_whole=False)
    start = 0
    while start < 100:
        stop = chunk_stop(request, quota, start, limits)
        assert start < stop <= start + quota.chunk_tokens
        start = stop
