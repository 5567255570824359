"""What a prompt finds in host memory, in vLLM's own engine core: who shares what with whom."""

from __future__ import annotations

import pickle
import random
from typing import TYPE_CHECKING, Any

import pytest
from vllm.config import MultiModalConfig
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import BLOCK_TOKENS, Core, configure, image
from vllm_budgetkv.start.host_memory import token_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace

LONG = 250
# of LONG tokens all but those whose queries score the cache
MOST = LONG - 32


def configured(qwen2: Path, host_tokens: int, **budget: Any) -> VllmConfig:
    plain = configure(qwen2)
    size = f"{host_tokens * token_bytes(plain) / 1e6 + 1e-6:.6f}MB"
    budget = {"host_memory": size, "retrieval_ratio": 1.0, "probe_tokens": 32, **budget}
    return configure(qwen2, "hybrid", budget=budget)


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configured(qwen2, 2000)


def places(core: Core) -> dict[str, list[HostPlace]]:
    """Where the worker was told that each request is kept, at each of its admissions."""
    found: dict[str, list[HostPlace]] = {}
    for scheduled in core.outputs:
        metadata = pickle.loads(pickle.dumps(scheduled)).kv_connector_metadata
        for name, place in metadata.places.items():
            found.setdefault(name, []).append(place)
    return found


def reused(core: Core) -> dict[str, int]:
    """Tokens that each request took over at its last admission."""
    return {name: told[-1].num_tokens for name, told in places(core).items()}


def ask(core: Core, *names: str, **fields: Any) -> None:
    """One after the other, each to its end."""
    for name in names:
        core.add(name, LONG, **fields)
        core.run()


def test_an_equal_prompt_starts_behind_its_beginning(config: VllmConfig) -> None:
    core = Core(config)
    ask(core, "first", "second")
    first, second = (places(core)[name][0] for name in ("first", "second"))
    assert (first.num_tokens, first.stops, first.num_shared) == (0, (), 0)
    assert len(first.blocks) == len(second.blocks) == 32
    assert second.num_tokens == MOST
    whole, rest = divmod(MOST, BLOCK_TOKENS)
    assert second.blocks[:whole] == first.blocks[:whole] and second.num_shared == whole
    assert second.tail_block == first.blocks[whole] and rest
    published = set(first.blocks[: LONG // BLOCK_TOKENS])
    assert not set(second.blocks[whole:]) & published, "it writes blocks of its own"
    assert second.stops == tuple(end for end in core.ends["first"] if end <= MOST)
    # the first of its chunks ends where the first's did
    assert core.ends["second"] == [end for end in core.ends["first"] if end > MOST]
    assert len(core.tokens["second"]) == 4


def test_its_blocks_are_those_of_the_quota(config: VllmConfig) -> None:
    core = Core(config)
    ask(core, "first", "second")
    for name in ("first", "second"):
        (new,) = (
            new
            for scheduled in core.outputs
            for new in scheduled.scheduled_new_reqs
            if new.req_id == name
        )
        assert len(new.block_ids[0]) == core.scheduler.quota.blocks


def test_cached_tokens_are_told(config: VllmConfig) -> None:
    core = Core(config)
    ask(core, "first", "second")
    assert core.cached_tokens == {"first": 0, "second": MOST}


def test_one_that_is_being_written_is_waited_for(config: VllmConfig) -> None:
    """As for several answers to one prompt: it is prefilled once, not for each."""
    core = Core(config)
    for name in ("a", "b", "c"):
        core.add(name, LONG)
    core.run()
    assert sorted(reused(core).values()) == [0, MOST, MOST]
    assert set(core.ended) == {"a", "b", "c"}


@pytest.mark.parametrize("num_steps", [2, 5, 9])
@pytest.mark.parametrize("how", ["aborted", "preempted"])
def test_who_waits_goes_on_if_the_writer_does_not(
    config: VllmConfig, num_steps: int, how: str
) -> None:
    core = Core(config)
    for name in ("a", "b"):
        core.add(name, LONG)
    for _ in range(num_steps):
        core.step()
    if how == "aborted":
        core.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    else:
        core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    assert core.ended["b"] == "length"
    assert how == "aborted" or core.ended["a"] == "length"


def test_a_preempted_request_resumes_from_what_it_wrote(config: VllmConfig) -> None:
    core = Core(config)
    core.add("r", LONG, output_tokens=30)
    while len(core.tokens.get("r", [])) < 10:
        core.step()
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    assert [place.num_tokens for place in places(core)["r"]] == [0, MOST]
    assert core.tokens["r"] == [*range(30)]
    assert [place.found_tokens for place in places(core)["r"]] == [0, 0]


def test_what_was_found_first_is_remembered(config: VllmConfig) -> None:
    """A preempted request is compressed again where it was: chunks of its own are not joined."""
    core = Core(config)
    ask(core, "first")
    core.scheduler.add_request(core.make("r", [*range(150), *range(5000, 5100)], output_tokens=30))
    while len(core.tokens.get("r", [])) < 10:
        core.step()
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    shared = 150 // BLOCK_TOKENS * BLOCK_TOKENS
    assert [place.num_tokens for place in places(core)["r"]] == [shared, MOST]
    assert [place.found_tokens for place in places(core)["r"]] == [shared, shared]
    ask(core, "r")
    assert places(core)["r"][-1].found_tokens == MOST


def test_the_end_of_a_picture_inside_a_block_is_found(config: VllmConfig) -> None:
    """The same picture and another question: no token of it is computed again."""
    core = Core(config, encoder_embeds=200)
    pictures = [image(10, 105, "a")]
    core.add("first", LONG, images=pictures)
    core.run()
    prompt = [*range(115), *range(5000, 5000 + LONG - 115)]
    core.scheduler.add_request(core.make("second", prompt, pictures))
    core.run()
    assert reused(core)["second"] == 115
    encoded = [name for scheduled in core.outputs for name in scheduled.scheduled_encoder_inputs]
    assert encoded == ["first"]


@pytest.mark.parametrize("other", ["picture", "salt", "text"])
def test_nothing_of_another_content_is_found(config: VllmConfig, other: str) -> None:
    core = Core(config, encoder_embeds=200)
    core.add("first", LONG, images=[image(0, 105, "a")])
    core.run()
    prompt = [*range(LONG)]
    if other == "text":
        prompt[3] = 9999
    request = core.make("second", prompt, [image(0, 105, "b" if other == "picture" else "a")],
                        salt="mine" if other == "salt" else None)  # fmt: skip
    core.scheduler.add_request(request)
    core.run()
    assert reused(core)["second"] == 0


@pytest.mark.parametrize(("name", "found"), [("a", 86), ("b", 80)])
def test_a_picture_inside_a_block_counts(config: VllmConfig, name: str, found: int) -> None:
    """No whole block in front of its end tells one from another."""
    core = Core(config, encoder_embeds=200)
    core.add("first", LONG, images=[image(82, 4, "a")])
    core.run()
    prompt = [*range(86), *range(5000, 5000 + LONG - 86)]
    core.scheduler.add_request(core.make("second", prompt, [image(82, 4, name)]))
    core.run()
    assert reused(core)["second"] == found


def test_a_server_may_refuse_it(qwen2: Path) -> None:
    core = Core(configured(qwen2, 2000, reuse=False))
    ask(core, "first", "second")
    assert reused(core) == {"first": 0, "second": 0}


def test_a_prompt_whose_text_does_not_run_ahead_takes_over_nothing(qwen2: Path) -> None:
    """Nothing could choose what it keeps of it."""
    core = Core(configured(qwen2, 2000, lookahead=False))
    ask(core, "first", "second")
    assert reused(core) == {"first": 0, "second": 0}


def test_short_prompts_are_not_kept(config: VllmConfig) -> None:
    core = Core(config)
    core.add("short", 60)
    core.run()
    assert places(core) == {}


def test_without_room_it_is_computed_as_ever(qwen2: Path) -> None:
    core = Core(configured(qwen2, 300))
    core.add("first", LONG, output_tokens=100)
    while len(core.tokens.get("first", [])) < 3:
        core.step()
    core.scheduler.add_request(core.make("second", range(5000, 5000 + LONG)))
    while "second" not in core.ended:
        core.step()
    assert set(places(core)) == {"first"}
    core.run()
    # what the first wrote is there until it is taken
    ask(core, "third")
    assert reused(core)["third"] == MOST


def test_nothing_is_found_once_the_cache_is_reset(config: VllmConfig) -> None:
    """As behind new weights."""
    core = Core(config)
    ask(core, "first")
    assert core.scheduler.reset_prefix_cache(reset_connector=True)
    ask(core, "second")
    assert reused(core)["second"] == 0


@pytest.mark.parametrize("seed", range(12))
def test_nobody_reads_what_another_writes(qwen2: Path, seed: int) -> None:
    """Families of prompts come at random, some are aborted or preempted, host memory is short."""
    chance = random.Random(seed)
    core = Core(configured(qwen2, chance.choice([300, 600, 2000])), pool_blocks=60)
    check = Contents()
    prompts = {}
    for number in range(25):
        name = f"r{number}"
        family, shared = chance.randrange(3), chance.randint(1, LONG)
        own = 10_000 * (number + 1)
        length = chance.choice([LONG, 180, 120])
        words = [family * 1000 + i if i < shared else own + i for i in range(length)]
        prompts[name] = words
        core.scheduler.add_request(core.make(name, words, output_tokens=chance.randint(1, 30)))
        for _ in range(chance.randint(0, 14)):
            check.follow(core.step(), prompts)
        if chance.random() < 0.2:
            core.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if chance.random() < 0.1:
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
    while core.scheduler.has_unfinished_requests():
        check.follow(core.step(), prompts)
    assert check.num_reused > 3


class Contents:
    """A worker that keeps the words themselves: what a request takes over must be its own words."""

    def __init__(self) -> None:
        self.words: dict[int, list[int | None]] = {}
        self.places: dict[str, HostPlace] = {}
        self.num_reused = 0

    def follow(self, scheduled: SchedulerOutput, prompts: dict[str, list[int]]) -> None:
        metadata = scheduled.kv_connector_metadata
        for name in scheduled.finished_req_ids:
            self.places.pop(name, None)
        admitted = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts = {**admitted, **dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))}
        for name in (*admitted, *cached.resumed_req_ids):
            self.places.pop(name, None)
        for name, place in metadata.places.items():
            self._enter(name, place, prompts[name])
            assert starts[name] == place.num_tokens
        for name, count in scheduled.num_scheduled_tokens.items():
            if name in self.places:
                self._write(self.places[name], prompts[name], starts[name], count)

    def _enter(self, name: str, place: HostPlace, words: list[int]) -> None:
        fresh = place.blocks[place.num_shared :]
        in_use = {block for other in self.places.values() for block in other.blocks}
        assert not in_use & set(fresh), "a block in use was given away"
        tail = list(self.words[place.tail_block]) if place.tail_block is not None else []
        for block in fresh:
            self.words[block] = [None] * BLOCK_TOKENS
        rest = place.num_tokens % BLOCK_TOKENS
        if place.tail_block is not None:
            self.words[fresh[0]][:rest] = tail[:rest]
        kept = [word for block in place.blocks for word in self.words[block]]
        assert kept[: place.num_tokens] == words[: place.num_tokens]
        self.num_reused += place.num_tokens > 0
        self.places[name] = place

    def _write(self, place: HostPlace, words: list[int], start: int, count: int) -> None:
        for position in range(start, min(start + count, len(words))):
            block, offset = divmod(position, BLOCK_TOKENS)
            assert block >= place.num_shared, "what others read is never written"
            self.words[place.blocks[block]][offset] = words[position]


def test_a_server_that_does_not_know_equal_pictures_says_so(
    qwen2: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: with both of vLLM's caches off a second question on a video found nothing."""
    said = "does not tell which pictures are equal"
    vllm_config = configured(qwen2, 2000)
    Core(vllm_config)
    assert said not in heard.text
    media = MultiModalConfig(mm_processor_cache_gb=0)
    monkeypatch.setattr(vllm_config.model_config, "multimodal_config", media)
    Core(vllm_config)
    assert said not in heard.text
    monkeypatch.setattr(vllm_config.cache_config, "enable_prefix_caching", False)
    Core(vllm_config)
    assert said in heard.text
