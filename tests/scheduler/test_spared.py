"""A prompt in host memory needs no look-ahead: it reads its question before anything is chosen."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import Core, image
from tests.scheduler.test_connector import LONG, MOST, ask, configured, reused
from vllm_budgetkv.scheduler.connector import HostConnector
from vllm_budgetkv.scheduler.lookahead import LookaheadParams

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configured(qwen2, 2000)


def parents(core: Core) -> list[str]:
    """The requests that something ran ahead of, in order."""
    return [
        new.sampling_params.parent_id
        for scheduled in core.outputs
        for new in scheduled.scheduled_new_reqs
        if isinstance(new.sampling_params, LookaheadParams)
    ]


def assert_nothing_is_left(core: Core) -> None:
    ahead = core.scheduler.lookaheads
    assert not (ahead.parents or ahead.held or ahead.spared or ahead.late or ahead.take_lost())
    connector = core.scheduler.connector
    assert isinstance(connector, HostConnector)
    assert not connector._keys and not connector._found_tokens and not connector._prompts._kept
    assert not core.scheduler.requests and not core.scheduler._manager._expected


def test_it_is_admitted_in_the_first_step(config: VllmConfig) -> None:
    core = Core(config)
    ask(core, "first")
    core.add("second", LONG)
    chunk_tokens = core.scheduler.quota.chunk_tokens
    assert core.step().num_scheduled_tokens == {"second": chunk_tokens - MOST % chunk_tokens}
    core.run()
    assert core.ends["second"][:2] == [MOST + chunk_tokens - MOST % chunk_tokens, LONG]
    assert parents(core) == ["first"] and reused(core)["second"] == MOST
    assert_nothing_is_left(core)


@pytest.mark.parametrize("changes", [{"recall_prefill": "none"}, {"lookahead_source": "text"}])
def test_one_that_what_runs_ahead_chooses_for_still_waits(
    qwen2: Path, changes: dict[str, str]
) -> None:
    """It reads its question behind what was chosen; or text in front of a picture asks, too."""
    core = Core(configured(qwen2, 2000, **changes), encoder_embeds=300)
    pictures = [image(10, 235, "a")]
    for name in ("first", "second"):
        core.add(name, LONG, images=pictures)
        core.run()
    assert parents(core) == ["first", "second"]
    assert reused(core)["second"] > 0


@pytest.mark.parametrize(("behind", "waits"), [(5, True), (30, False)])
def test_the_text_behind_the_picture_must_be_a_question(
    config: VllmConfig, behind: int, *, waits: bool
) -> None:
    core = Core(config, encoder_embeds=300)
    pictures = [image(10, LONG - 10 - behind, "a")]
    for name in ("first", "second"):
        core.add(name, LONG, images=pictures)
        core.run()
    assert parents(core) == ["first", *["second"] * waits]
    assert reused(core)["second"] == max(MOST, LONG - behind)


def lost(config: VllmConfig) -> Core:
    """Host memory forgets a prompt between its arrival and its admission."""
    core = Core(config)
    ask(core, "first")
    core.add("second", LONG)
    assert core.scheduler.lookaheads.spared == {"second"}
    assert core.scheduler.reset_prefix_cache(reset_connector=True)
    return core


def test_one_that_finds_nothing_after_all_has_a_look_ahead_first(config: VllmConfig) -> None:
    core = lost(config)
    assert not core.step().num_scheduled_tokens
    (ahead,) = core.step().num_scheduled_tokens
    assert ahead != "second"
    core.run()
    assert parents(core) == ["first", "second"] and reused(core)["second"] == 0
    assert core.ended["second"] == "length"
    assert_nothing_is_left(core)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("everyone", [False, True])
def test_it_may_be_aborted_at_any_time(
    config: VllmConfig, num_steps: int, *, everyone: bool
) -> None:
    core = lost(config)
    for _ in range(num_steps):
        core.step()
    core.scheduler.finish_requests(None if everyone else "second", RequestStatus.FINISHED_ABORTED)
    assert not core.scheduler.has_unfinished_requests()
    core.step()
    assert "second" not in core.ended
    assert_nothing_is_left(core)


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_pause_ends_though_one_waits_for_a_late_one(
    config: VllmConfig, num_steps: int, state: PauseState
) -> None:
    """The bug: a pair that counted as one looked like a request that has ended, so a pause that
    waits until nothing is left to do waited for ever."""
    core = lost(config)
    core.step()
    core.scheduler.set_pause_state(state)
    for _ in range(num_steps):
        core.step()
    assert not core.scheduler.has_requests()
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    core.run()
    assert core.ended["second"] == "length"


def test_a_request_that_is_aborted_while_it_is_held_leaves_nothing(config: VllmConfig) -> None:
    core = Core(config)
    core.add("first", LONG)
    core.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    core.step()
    assert_nothing_is_left(core)


def test_one_that_is_preempted_and_finds_nothing_has_one_too(config: VllmConfig) -> None:
    core = Core(config)
    ask(core, "first")
    core.add("second", LONG, output_tokens=30)
    while len(core.tokens.get("second", [])) < 5:
        core.step()
    core.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    core.run()
    assert parents(core) == ["first", "second"]
    assert core.tokens["second"] == [*range(30)]
    assert_nothing_is_left(core)


def test_one_that_wants_all_logprobs_takes_over_nothing_and_has_one(config: VllmConfig) -> None:
    """vLLM lets it begin with nothing, whatever is there."""
    core = Core(config)
    ask(core, "first")
    request = core.make("second", [*range(LONG)])
    request.skip_reading_prefix_cache = True
    core.scheduler.add_request(request)
    core.run()
    assert reused(core)["second"] == 0
    assert parents(core) == ["first", "second"]


@pytest.mark.parametrize("seed", range(8))
def test_nobody_begins_without_its_question(qwen2: Path, seed: int) -> None:
    """Aborts, preemptions and a short host memory: who computes more than its question has had a
    look-ahead."""
    chance = random.Random(seed)
    host_tokens = chance.choice([600, 900])
    core = Core(configured(qwen2, host_tokens, lookahead_tokens=LONG - MOST), pool_blocks=60)
    for number in range(30):
        family = chance.randrange(3)
        words = [family * 1000 + i for i in range(LONG - 10)]
        words += [10_000 * (number + 1) + i for i in range(10)]
        core.scheduler.add_request(core.make(f"r{number}", words, output_tokens=20))
        for _ in range(chance.choice([0, 5, 40])):
            core.step()
        if chance.random() < 0.1:
            core.scheduler.finish_requests(f"r{number}", RequestStatus.FINISHED_ABORTED)
        if chance.random() < 0.2:
            core.scheduler.reset_prefix_cache(
                reset_running_requests=True, reset_connector=chance.random() < 0.5
            )
    core.run()
    ran, spared = set(parents(core)), 0
    for number in range(30):
        name = f"r{number}"
        if name in core.ended and name not in ran:
            spared += 1
            assert min(core.ends[name]) > MOST, name
    assert spared
    assert_nothing_is_left(core)
