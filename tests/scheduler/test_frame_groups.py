"""Videos in groups of frames: the parts are the whole, and the encoder keeps what chunks need."""

from __future__ import annotations

import copy
import pickle
import random
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.multimodal.utils import group_and_batch_mm_kwargs, strip_covered_mm_data
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import Core, configure, image
from vllm_budgetkv.arithmetic.frame_groups import (
    bounded_encoder_tokens,
    group_stops,
    whole_items,
)
from vllm_budgetkv.scheduler.frame_groups import FrameGroup, cut_videos
from vllm_budgetkv.scheduler.stripped import StrippedItems, brought_by
from vllm_budgetkv.start.frame_groups import GRID, PIXELS, frames_of, items_refusal

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

MERGED = 4


def video(
    offset: int,
    num_frames: int,
    frame_tokens: int,
    name: str = "video",
    *,
    text_tokens: int = 0,
) -> MultiModalFeatureSpec:
    """A video as Qwen's processors make it; `text_tokens` stand in front of each frame."""
    grid = torch.tensor([[num_frames, 2, 2 * frame_tokens]])
    rows = num_frames * frame_tokens * MERGED
    pixels = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    fields = {
        PIXELS: MultiModalFieldConfig.flat_from_sizes("video", grid.prod(-1)),
        GRID: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        "timestamps": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        "second_per_grid_ts": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
    }
    values: dict[str, Any] = {
        PIXELS: pixels,
        GRID: grid,
        "timestamps": [[i / 2 for i in range(num_frames)]],
        "second_per_grid_ts": torch.tensor([0.5]),
    }
    elems = {name: config.build_elems(name, values[name])[0] for name, config in fields.items()}
    mask = None
    if text_tokens:
        frame = torch.tensor([False] * text_tokens + [True] * frame_tokens)
        mask = frame.repeat(num_frames)
    length = num_frames * (frame_tokens + text_tokens)
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(elems),
        modality="video",
        identifier=name,
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=mask),
        mm_hash=name,
    )


@pytest.mark.parametrize(
    ("frames", "tokens", "stops"),
    [(1, 300, [1]), (3, 300, [1, 2, 3]), (5, 128, [2, 4, 5]), (4, 64, [4]), (4, 65, [3, 4])],
)
def test_groups_are_whole_frames(frames: int, tokens: int, stops: list[int]) -> None:
    assert group_stops(frames, tokens) == stops


def test_the_encoder_takes_a_chunk_or_the_largest_other_item() -> None:
    assert bounded_encoder_tokens(512, 0) == 2560
    assert bounded_encoder_tokens(512, 16384) == 16384


@pytest.mark.parametrize("text_tokens", [0, 3])
@pytest.mark.parametrize(("num_frames", "frame_tokens"), [(7, 4), (65, 1), (3, 63)])
def test_the_groups_are_the_video(num_frames: int, frame_tokens: int, text_tokens: int) -> None:
    feature = video(5, num_frames, frame_tokens, text_tokens=text_tokens)
    before = copy.deepcopy(feature)
    groups = cut_videos([feature], group_tokens=2 * frame_tokens)
    assert len(groups) == -(-num_frames // 2)
    place, stop = feature.mm_position, feature.mm_position.offset
    embeds, mask = 0, []
    for group in groups:
        assert group.mm_position.offset == stop
        stop += group.mm_position.length
        if group.mm_position.is_embed is not None:
            # a time is needed by the chunk that ends in front of its frame, the frame is not
            assert group is groups[0] or group.mm_position.is_embed[0]
            mask.append(group.mm_position.is_embed)
        frames = frames_of(group)
        assert frames is not None
        assert group.mm_position.get_num_embeds() == frames.num_frames * frame_tokens
        assert len(group.data["timestamps"].data) == frames.num_frames
        embeds += group.mm_position.get_num_embeds()
    assert (stop, embeds) == (place.offset + place.length, place.get_num_embeds())
    if text_tokens:
        assert torch.equal(torch.cat(mask), place.is_embed)
    ((_, num, batch),) = group_and_batch_mm_kwargs([(g.modality, g.data) for g in groups])
    assert num == len(groups)
    assert torch.equal(batch[PIXELS], feature.data[PIXELS].data)
    assert batch[GRID].sum(0)[0] == num_frames
    assert len({group.identifier for group in groups}) == len(groups)
    # what the processor made serves the next request, too
    assert feature == before


def test_the_first_group_has_the_video_whole_without_its_pixels() -> None:
    one, other = video(4, 9, 4), image(60, 7, "picture")
    cut = [pickle.loads(pickle.dumps(f)) for f in cut_videos([one, other], group_tokens=8)]
    assert [type(feature) for feature in cut] == [FrameGroup] * 5 + [MultiModalFeatureSpec]
    found, picture = whole_items(cut)
    assert (found.mm_position, found.identifier) == (one.mm_position, "video")
    assert sorted(found.data) == sorted(set(one.data) - {PIXELS})
    assert torch.equal(found.data[GRID].data, one.data[GRID].data)
    assert picture.identifier == "picture"
    # a prompt whose beginning is known already loses the pixels and nothing else
    stripped = whole_items(strip_covered_mm_data(cut, 12, uses_mrope=True))
    assert [feature.mm_position for feature in stripped] == [one.mm_position, other.mm_position]
    assert stripped[0].data[GRID].data.tolist() == [9, 2, 8]


@pytest.mark.parametrize("copies", [False, True])
def test_a_copy_is_no_larger_than_its_frames(copies: bool) -> None:
    """Ray sends all that a view is of."""
    one = video(0, 8, 64)
    assert one.data is not None
    sizes = [
        len(group.data[PIXELS].data.untyped_storage()) for group in cut_videos([one], copies=copies)
    ]
    all_bytes = len(one.data[PIXELS].data.untyped_storage())
    assert sizes == [all_bytes // 2 if copies else all_bytes] * 2


def test_equal_videos_have_equal_groups() -> None:
    names = [
        [group.identifier for group in cut_videos([video(start, 9, 4)], 8)] for start in (0, 77)
    ]
    assert names[0] == names[1]


def unsplit() -> dict[str, MultiModalFeatureSpec]:
    """Items that stay whole."""
    usual = video(0, 8, 64)
    assert usual.data is not None
    grid = MultiModalFieldElem(torch.tensor([[1, 2, 128]] * 8), usual.data[GRID].field)
    return {
        "picture": image(0, 1000, "picture"),
        "one group": video(0, 4, 64),
        "without data": replace(usual, data=None),
        "a grid for each frame": replace(
            usual, data=MultiModalKwargsItem({**usual.data, GRID: grid})
        ),
        "without pixels": replace(usual, data=MultiModalKwargsItem({GRID: usual.data[GRID]})),
        "tokens that are no frames": replace(
            usual, mm_position=PlaceholderRange(offset=0, length=513)
        ),
    }


@pytest.mark.parametrize("name", unsplit())
def test_what_cannot_be_told_apart_stays_whole(name: str) -> None:
    item = unsplit()[name]
    assert cut_videos([item]) == [item]


def test_sound_among_the_frames_keeps_a_video_whole() -> None:
    one, sound = video(0, 8, 64), image(100, 20, "sound")
    assert cut_videos([one, sound]) == [one, sound]


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configure(qwen2)


def held_embeds(core: Core) -> int:
    """Embeddings that workers hold behind a step, by what they were told."""
    return sum(core.scheduler.encoder_cache_manager.num_embeds_by_hash.values())


@pytest.mark.parametrize("seed", range(4))
def test_the_encoder_keeps_no_more_for_a_longer_video(config: VllmConfig, seed: int) -> None:
    """Chunks, aborts and preemptions at random: no more than the encoder's room is held or made."""
    source = random.Random(seed)
    room = 700
    core = Core(config, pool_blocks=100, encoder_embeds=room, in_groups=True)
    lengths = {f"r{i}": source.choice([3, 17, 40]) for i in range(6)}
    for name, num_frames in lengths.items():
        feature = video(6, num_frames, 64, f"{name}-{num_frames}")
        core.add(name, 6 + num_frames * 64 + 9, 20, images=[feature])
    aborted = source.choice(list(lengths))
    for step in range(2000):
        if not core.scheduler.has_unfinished_requests():
            break
        if step == 30:
            core.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        if step == 60:
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
        core.step()
        assert held_embeds(core) <= room
        made = core.outputs[-1].scheduled_encoder_inputs
        assert (
            sum(
                core.scheduler.requests[name].get_num_encoder_embeds(i)
                for name, items in made.items()
                if name in core.scheduler.requests
                for i in items
            )
            <= room
        )
    assert not core.scheduler.requests
    manager = core.scheduler.encoder_cache_manager
    assert manager.num_freeable_slots == room and not manager.request_cached_ids
    assert set(core.ended) >= set(lengths) - {aborted}


@pytest.mark.parametrize(
    ("feature", "groups", "words"),
    [
        (video(4, 20, 64), False, "one video of 1280 tokens is computed as a whole"),
        (image(4, 1000, "picture"), True, "one image of 1000 tokens is computed as a whole"),
        (video(4, 2, 800), True, "frames of 800 tokens, but the encoder takes 700"),
    ],
)
def test_what_can_never_be_computed_ends_with_an_error(
    config: VllmConfig,
    feature: MultiModalFeatureSpec,
    groups: bool,
    words: str,
) -> None:
    assert words in (items_refusal([feature], 700, in_groups=groups) or "")
    core = Core(config, encoder_embeds=700, in_groups=groups)
    core.add("r", 1700, 4, images=[feature])
    core.add("other", 40)
    core.run(100)
    assert core.ended["r"] == "error" and len(core.tokens["other"]) == 4


def test_a_long_video_with_sound_among_its_frames_ends_with_an_error(config: VllmConfig) -> None:
    """The bug: it stays whole, but was taken for one in groups; nobody behind it ran any more."""
    core = Core(config, encoder_embeds=700, in_groups=True)
    core.add("r", 1700, 4, images=[video(4, 20, 64), image(100, 20, "sound")])
    core.add("other", 40)
    core.run(100)
    assert core.ended["r"] == "error" and len(core.tokens["other"]) == 4


def test_a_session_ends_where_its_next_video_can_never_be_computed(config: VllmConfig) -> None:
    """The bug: what a session goes on with was not looked at."""
    core = Core(config, encoder_embeds=700, in_groups=True)
    request = core.add("session", 40, 4)
    request.streaming_queue = deque()
    goes_on = copy.copy(request)
    goes_on.mm_features = [video(4, 20, 64)]
    core.scheduler.add_request(goes_on)
    core.add("other", 40)
    core.run(100)
    assert core.ended["session"] == "error" and len(core.tokens["other"]) == 4


def test_what_a_prefix_covered_is_sent_where_it_is_computed_again() -> None:
    """As vLLM strips it at admission, and once."""
    one = cut_videos([video(0, 9, 4)], group_tokens=8)
    sent = strip_covered_mm_data(one, 16, uses_mrope=True)
    requests: Any = {"r": SimpleNamespace(mm_features=one)}
    runners: Any = {"r": SimpleNamespace(mm_features=sent)}
    stripped = StrippedItems()

    def go(indices: list[int], *new: Any) -> bool:
        step = SchedulerOutput.make_empty()
        step.scheduled_new_reqs, step.scheduled_encoder_inputs = list(new), {"r": indices}
        brings = brought_by(pickle.loads(pickle.dumps(stripped.follow(step, requests))))
        if brings is not None:
            brings.give_to(runners)
        return brings is not None

    assert not go([2], SimpleNamespace(req_id="r", mm_features=sent))
    assert [a is b for a, b in zip(sent, one, strict=True)] == [False, False, True, True, True]
    assert [go(indices) for indices in ([0, 3], [0, 1], [0, 1])] == [True, True, False]
    for found, whole in zip(sent, one, strict=True):
        assert torch.equal(found.data[PIXELS].data, whole.data[PIXELS].data)
