"""Pictures whose tokens attend both ways: no chunk cuts one, whatever else is in the batch."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import TYPE_CHECKING

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.scheduler.engine_core import Core, configure, image
from vllm_budgetkv.scheduler.chunks import EncoderLimits, chunk_stop
from vllm_budgetkv.start import pictures
from vllm_budgetkv.start.activation import quota_of
from vllm_budgetkv.start.pictures import Pictures, Room

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm.config import VllmConfig

PROMPT_TOKENS, EMBEDS = 250, 40
# holds the longest request, so that nothing is compressed
ROOMY = {"page_quota": 512}
# one that a multiple of the chunk cuts, as long as a chunk, side by side, the prompt's last
PLACES = [(10, 20), (35, 24), (59, 20), (90, 8), (120, 24), (230, 20)]
ENDS = [8, 10, 30, 35, 59, 79, 90, 98, 120, 144, 168, 192, 216, 230, 250]


@pytest.fixture
def config(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    monkeypatch.setattr(pictures, "attend_both_ways", lambda model: True)
    return configure(qwen2)


def items(name: str = "") -> list[MultiModalFeatureSpec]:
    return [image(first, length, f"{name}{first}") for first, length in PLACES]


def cut(ends: list[int], images: Sequence[MultiModalFeatureSpec]) -> list[int]:
    """Ends of a request's steps inside of its pictures."""
    places = [each.mm_position for each in images]
    return [end for end in ends if any(p.offset < end < p.offset + p.length for p in places)]


def test_chunks_end_in_front_of_pictures(config: VllmConfig) -> None:
    core = Core(config, encoder_embeds=EMBEDS)
    core.add("r", PROMPT_TOKENS, images=items())
    core.run()
    assert [end for end in core.ends["r"] if end <= PROMPT_TOKENS] == ENDS


def test_a_first_page_that_a_picture_begins_is_the_picture(config: VllmConfig) -> None:
    core = Core(config, encoder_embeds=EMBEDS)
    core.add("r", PROMPT_TOKENS, images=[image(0, 20, "a")])
    core.run()
    assert core.ends["r"][:3] == [20, 24, 48]


@pytest.mark.parametrize("seed", range(8))
def test_no_load_cuts_a_picture(config: VllmConfig, seed: int) -> None:
    """Long prompts end their chunks where they do alone; short ones, which fit, wait for room.

    Some are preempted, and nobody starves.
    """
    chance = random.Random(seed)
    core = Core(config, pool_blocks=60, encoder_embeds=EMBEDS)
    longs = [f"long{i}" for i in range(4)]
    images = {}
    for name in longs:
        images[name] = items(name)
        core.add(name, PROMPT_TOKENS, chance.randint(1, 30), images[name])
        for other in [f"{name}-{i}" for i in range(chance.randint(0, 3))]:
            images[other] = [image(chance.randint(0, 20), chance.randint(2, 24), other)]
            core.add(other, chance.randint(44, 80), chance.randint(1, 40), images[other])
        for _ in range(chance.randint(0, 12)):
            core.step()
    core.run()
    assert {*core.ended} == {*images}
    for name, ends in core.ends.items():
        assert cut(ends, images[name]) == []
    alone = Core(config, encoder_embeds=EMBEDS)
    alone.add("r", PROMPT_TOKENS, images=items())
    alone.run()
    expected = [end for end in alone.ends["r"] if end <= PROMPT_TOKENS]
    for name in longs:
        ends = [end for end in core.ends[name] if end <= PROMPT_TOKENS]
        assert ends[-len(expected) :] == expected


def test_a_quota_that_holds_everything_cuts_none_either(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decodes leave of a step would end inside of the second picture."""
    monkeypatch.setattr(pictures, "attend_both_ways", lambda model: True)
    core = Core(configure(qwen2, budget=ROOMY), encoder_embeds=EMBEDS)
    for i in range(3):
        core.add(f"decode{i}", 4, output_tokens=30)
    core.step()
    images = [image(29, 24, "a"), image(53, 25, "b")]
    core.add("r", 120, images=images)
    core.run()
    assert core.ends["r"][:2] == [29, 53]
    assert cut(core.ends["r"], images) == []


@pytest.mark.parametrize(("budget", "most"), [({}, 24), (ROOMY, 25)], ids=["chunk", "step"])
def test_a_picture_that_no_chunk_holds_is_refused(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, int], most: int
) -> None:
    """In both numbers; another front end's request ends with an error and holds nobody back."""
    monkeypatch.setattr(pictures, "attend_both_ways", lambda model: True)
    core = Core(configure(qwen2, budget=budget), encoder_embeds=EMBEDS)
    core.add("r", PROMPT_TOKENS, images=[image(10, 26, "a")])
    core.add("other", 40)
    core.run()
    assert core.ended == {"r": "error", "other": "length"}
    whole = Pictures(
        attend_both_ways=True, window_tokens=None, step=Room(25, "--max-num-batched-tokens", 7)
    )
    quota = quota_of(core.scheduler.vllm_config)
    said = whole.refusal([image(10, 26, "a")], quota)
    assert said is not None
    assert f"has 26 tokens that attend to each other, but a step computes at most {most}" in said
    flag = "--max-num-batched-tokens of at least 33 (or a" if budget else "--kv-chunk-tokens of at"
    assert flag in said
    assert whole.refusal([image(10, most, "a")], quota) is None


def test_a_session_ends_where_no_step_holds_its_next_picture(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "attend_both_ways", lambda model: True)
    core = Core(configure(qwen2, budget=ROOMY), encoder_embeds=EMBEDS)
    request = core.add("session", 40, 4)
    request.streaming_queue = deque()
    goes_on = copy.copy(request)
    goes_on.mm_features = [image(4, 26, "a")]
    core.scheduler.add_request(goes_on)
    core.add("other", 40)
    core.run(100)
    assert core.ended["session"] == "error" and len(core.tokens["other"]) == 4


def side_by_side(count: int, name: str) -> list[MultiModalFeatureSpec]:
    """Pictures of 20 tokens as in Gemma 3: 3 of text in front of each and 2 behind it, of which the
    last is the next one's first."""
    mask = torch.zeros(25, dtype=torch.bool)
    mask[3:23] = True
    return [
        MultiModalFeatureSpec(
            data=None,
            modality="image",
            identifier=f"{name}-{place}",
            mm_hash=f"{name}-{place}",
            mm_position=PlaceholderRange(offset=6 + 24 * place, length=25, is_embed=mask),
        )
        for place in range(count)
    ]


@pytest.mark.parametrize("embeds", [20, 39, 45, 65])
@pytest.mark.parametrize("budget", [{}, ROOMY], ids=["long", "fits"])
def test_pictures_side_by_side_hold_nobody_back(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, int], embeds: int
) -> None:
    """The bug: each request held a picture of which all was computed, and waited for the next one.

    Also alone, where the encoder's cache holds one of them and not two.
    """
    monkeypatch.setattr(pictures, "attend_both_ways", lambda model: True)
    core = Core(configure(qwen2, budget=budget), encoder_embeds=embeds)
    for number in range(10):
        core.add(f"r{number}", 160, images=side_by_side(5, f"r{number}"))
    core.run(600)
    assert len(core.ended) == 10
    first = [(9 + 24 * place, 29 + 24 * place) for place in range(5)]
    for ends in core.ends.values():
        assert not [end for end in ends if any(a < end < b for a, b in first)]


def test_pictures_of_a_prompt() -> None:
    """Parts of an item by themselves, none longer than the window, and no audio."""
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0]).bool()
    parts = PlaceholderRange(offset=10, length=8, is_embed=mask)
    crops = MultiModalFeatureSpec(
        data=None, modality="image", identifier="a", mm_position=parts, mm_hash="a"
    )
    sound = MultiModalFeatureSpec(
        data=None, modality="audio", identifier="b", mm_hash="b",
        mm_position=PlaceholderRange(offset=0, length=3),
    )  # fmt: skip
    features = [sound, crops, image(20, 4, "c")]
    both = Pictures(attend_both_ways=True, window_tokens=None, step=Room(99, ""))
    assert both.among(features) == [(11, 13), (14, 17), (20, 24)]
    within = Pictures(attend_both_ways=True, window_tokens=3, step=Room(99, ""))
    assert within.among(features) == [(11, 13), (14, 17)]
    assert (
        Pictures(attend_both_ways=False, window_tokens=None, step=Room(99, "")).among(features)
        == []
    )


def test_the_encoder_and_pictures_together(config: VllmConfig) -> None:
    """What the encoder has no room for waits in front of its item."""
    request = Core(config, encoder_embeds=EMBEDS).add("r", PROMPT_TOKENS, images=items())
    quota, limits = quota_of(config), EncoderLimits(embeds=24, keeps_items_whole=False)
    whole = [(first, first + length) for first, length in PLACES]
    assert chunk_stop(request, quota, 8, limits, whole) == 10
    assert chunk_stop(request, quota, 35, limits, whole) == 59
