"""Where chunks end: by vLLM's own scheduler, whatever else is in the batch."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.scheduler.engine_core import Core, configure, image
from vllm_budgetkv.scheduler.chunks import EncoderLimits, chunk_stop
from vllm_budgetkv.start.activation import quota_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

    from vllm_budgetkv.arithmetic.quota import Quota

PROMPT_TOKENS = 250
EMBEDS = 40
# a picture that a chunk of 24 cuts, one longer than a chunk, many small ones, a repeated one
IMAGES = [
    image(10, 20, "a"),
    image(35, 36, "b"),
    *(image(90 + 9 * i, 8, f"small{i}") for i in range(10)),
    image(200, 20, "a"),
]


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configure(qwen2)


@pytest.fixture(scope="module")
def quota(config: VllmConfig) -> Quota:
    return quota_of(config)


def prompt_ends(core: Core, request_id: str, prompt_tokens: int = PROMPT_TOKENS) -> list[int]:
    return [end for end in core.ends[request_id] if end <= prompt_tokens]


def alone(config: VllmConfig, *, with_images: bool) -> list[int]:
    core = Core(config, encoder_embeds=EMBEDS)
    core.add("r", PROMPT_TOKENS, images=IMAGES if with_images else [])
    core.run()
    return prompt_ends(core, "r")


def test_text_is_cut_at_multiples_of_the_chunk(config: VllmConfig) -> None:
    """Behind a first page."""
    assert alone(config, with_images=False) == [8, *range(24, 250, 24), 250]


def test_what_is_encoded_together_is_what_fits_the_encoder(config: VllmConfig) -> None:
    """`b` has no room beside `a`, and 24 tokens of small pictures have."""
    assert alone(config, with_images=True) == [8, 24, 35, 48, 72, *range(96, 250, 24), 250]


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("seed", range(6))
def test_ends_do_not_depend_on_the_load(config: VllmConfig, seed: int, with_images: bool) -> None:
    """Requests of all kinds come at random, some of them are preempted; and nobody starves."""
    chance = random.Random(seed)
    core = Core(config, pool_blocks=60, encoder_embeds=EMBEDS)
    names = [f"r{i}" for i in range(6)]
    for i, name in enumerate(names):
        images = IMAGES if with_images else []
        mine = [image(f.mm_position.offset, f.mm_position.length, f"{f.identifier}-{i % 3}")
                for f in images]  # fmt: skip
        core.add(name, PROMPT_TOKENS, output_tokens=chance.randint(1, 30), images=mine)
        for other in range(chance.randint(0, 3)):
            core.add(f"other{i}-{other}", chance.randint(1, 90), chance.randint(1, 40))
        for _ in range(chance.randint(0, 12)):
            core.step()
    core.run()
    expected = alone(config, with_images=with_images)
    for name in names:
        ends = prompt_ends(core, name)
        # a preempted one begins again
        starts = [i for i, end in enumerate(ends) if end == expected[0]]
        for start, stop in zip(starts, [*starts[1:], len(ends)], strict=True):
            assert ends[start:stop] == expected[: stop - start]
        assert ends[starts[-1] :] == expected
    assert len(core.ended) == len(core.tokens)


def test_a_whole_chunk_waits_and_holds_nobody_back(config: VllmConfig) -> None:
    """A whole chunk and 8 other tokens fit a step: the second prompt waits until the first has
    ended, and a short one that comes last runs at once."""
    core = Core(config)
    for name in ("first", "second"):
        core.add(name, PROMPT_TOKENS)
    core.add("short", 6)
    for _ in range(4):
        core.step()
    assert core.ends["first"] == [8, 24, 48, 72]
    assert core.ends["second"] == [8, 24]
    assert core.tokens["short"]
    core.run()
    assert prompt_ends(core, "second") == prompt_ends(core, "first")


def test_decodes_never_starve_a_chunk(config: VllmConfig) -> None:
    """As many as there can be beside it."""
    core = Core(config)
    for i in range(7):
        core.add(f"decode{i}", 4, output_tokens=80)
    for _ in range(4):
        core.step()
    core.add("long", PROMPT_TOKENS)
    for _ in range(len(alone(config, with_images=False))):
        core.step()
    assert core.ends["long"][-1] == PROMPT_TOKENS


def test_two_that_wait_for_the_encoder_do_not_wait_for_each_other(config: VllmConfig) -> None:
    """Each has begun a picture, and needs another that the encoder's cache holds beside one."""
    core = Core(config, encoder_embeds=60)
    for name in ("first", "second"):
        core.add(name, 120, images=[image(20, 25, f"{name}-a"), image(46, 25, f"{name}-b")])
    core.step()
    core.step()
    assert core.ends == {"first": [8, 24], "second": [8, 24]}
    assert core.scheduler.encoder_cache_manager.num_freeable_slots == 10
    core.run(most_steps=40)
    for name in ("first", "second"):
        assert prompt_ends(core, name, 120) == [8, 24, 48, 72, 96, 120]


def test_a_preempted_request_is_compressed_where_it_was(config: VllmConfig, quota: Quota) -> None:
    """Output that is computed again comes in chunks that end where decode compacted."""
    core = Core(config)
    core.add("long", PROMPT_TOKENS, output_tokens=60)
    core.add("outgrows", 60, output_tokens=90)
    while len(core.tokens.get("outgrows", [])) < 50:
        core.step()
    for name, prompt_tokens in (("long", PROMPT_TOKENS), ("outgrows", 60)):
        assert core.scheduler.requests[name].num_tokens > max(prompt_tokens, quota.tokens)
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    seen = {name: len(ends) for name, ends in core.ends.items()}
    core.run()
    again = {name: ends[seen[name] :] for name, ends in core.ends.items()}
    first, second = again["long"], again["outgrows"]
    assert first[: len(alone(config, with_images=False))] == alone(config, with_images=False)
    for ends, prompt_tokens in ((first, PROMPT_TOKENS), (second, 60)):
        stops = [start for start in range(400) if quota.compacts_before(start, prompt_tokens)]
        assert {stop for stop in stops if stop <= ends[-1]} <= set(ends)
        assert len(ends) < 100, "output is computed again in chunks"


@pytest.mark.parametrize(
    ("start", "embeds", "whole", "stop"),
    [
        (0, 40, False, 8),
        (8, 40, False, 24),
        (24, 55, False, 35),
        (24, 56, False, 48),
        (24, 56, True, 35),
        (35, 40, True, 48),
        (72, 40, True, 90),
        (96, 24, False, 117),
        (96, 32, False, 120),
        (192, 20, False, 216),
    ],
    ids=["page", "fits", "two-do-not-fit", "two-fit", "kept-whole", "too-long-to-keep", "small",
         "as-many-as-fit", "all-fit", "end-of-chunk"],
)  # fmt: skip
def test_chunk_stop(
    config: VllmConfig, quota: Quota, start: int, embeds: int, whole: bool, stop: int
) -> None:
    request = Core(config).add("r", PROMPT_TOKENS, images=IMAGES)
    assert chunk_stop(request, quota, start, EncoderLimits(embeds, whole)) == stop


def test_the_first_chunk_ends_before_the_first_picture(config: VllmConfig, quota: Quota) -> None:
    """So that a request waits for the encoder in the running list, where it blocks nobody."""
    request = Core(config).add("r", PROMPT_TOKENS, images=[image(5, 60, "a")])
    assert chunk_stop(request, quota, 0, EncoderLimits(60, False)) == 5


@pytest.mark.parametrize("repeats", [0, 1])
def test_one_picture_twice_takes_the_encoder_once(
    config: VllmConfig, quota: Quota, repeats: int
) -> None:
    images = [image(10, 6, "a"), image(17, 6, "b" if repeats else "a")]
    request = Core(config).add("r", PROMPT_TOKENS, images=images)
    assert chunk_stop(request, quota, 8, EncoderLimits(6, False)) == (17 if repeats else 24)
