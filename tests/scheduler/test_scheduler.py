"""Our scheduler over vLLM's own: the quota that it counts with, and whom it knows for a client."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import Core, configure, image
from vllm_budgetkv.scheduler.lookahead import parent_of
from vllm_budgetkv.start.activation import quota_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

LONG, SHORT = 250, 20


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configure(qwen2, "hybrid")


def new_ids(scheduled: SchedulerOutput, *, ahead: bool) -> list[str]:
    """Ids of the new requests that are look-aheads, or that are a client's."""
    new = pickle.loads(pickle.dumps(scheduled)).scheduled_new_reqs
    return [data.req_id for data in new if (parent_of(data) is not None) == ahead]


def test_a_look_ahead_runs_before_its_parent(config: VllmConfig) -> None:
    core = Core(config)
    core.add("r", LONG)
    assert core.scheduler.get_request_counts() == (0, 1)
    core.run()
    ahead = [name for scheduled in core.outputs for name in new_ids(scheduled, ahead=True)]
    clients = [name for scheduled in core.outputs for name in new_ids(scheduled, ahead=False)]
    assert len(ahead) == 1 and clients == ["r"]
    assert core.tokens == {"r": [0, 1, 2, 3]} and core.ended == {"r": "length"}
    assert not core.scheduler.requests and not core.scheduler._manager._expected


@pytest.mark.parametrize(
    "names",
    [["r#kv-lookahead"], ["r", "r#kv-lookahead"], ["kv-lookahead-0", "r"],
     ["r#kv-lookahead", "r#kv-lookahead#kv-lookahead"]],
    ids=["alone", "beside-its-parent", "prefix", "twice"],
)  # fmt: skip
@pytest.mark.parametrize("prompt_tokens", [SHORT, LONG], ids=["short", "long"])
def test_a_client_may_have_any_id(config: VllmConfig, names: list[str], prompt_tokens: int) -> None:
    """A look-ahead was known by the end of its id: such a client waited for ever, and if it was
    what another request's look-ahead was called, the engine ended."""
    core = Core(config)
    for name in names:
        core.add(name, prompt_tokens)
    core.run()
    assert core.tokens == {name: [0, 1, 2, 3] for name in names}
    assert core.ended == dict.fromkeys(names, "length")


@pytest.mark.parametrize("num_steps", range(6))
def test_an_aborted_client_takes_its_look_ahead_along(config: VllmConfig, num_steps: int) -> None:
    core = Core(config)
    core.add("r", LONG)
    core.add("other", LONG)
    for _ in range(num_steps):
        core.step()
    finished = core.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert [request.request_id for request in finished] == ["r"]
    core.add("r", SHORT, output_tokens=2)
    core.run()
    assert core.tokens["r"][-2:] == [0, 1] and core.ended == {"r": "length", "other": "length"}
    told = {name for scheduled in core.outputs for name in scheduled.finished_req_ids}
    new = {name for scheduled in core.outputs for name in new_ids(scheduled, ahead=True)}
    assert new <= told, "the worker is told that every look-ahead ended"
    assert not core.scheduler.lookaheads.parents and not core.scheduler.lookaheads.held


def test_all_are_finished_at_once(config: VllmConfig) -> None:
    core = Core(config)
    for name in ("a", "b"):
        core.add(name, LONG)
    core.step()
    finished = core.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert sorted(request.request_id for request in finished) == ["a", "b"]
    assert not core.scheduler.has_unfinished_requests()


def test_a_session_ends_with_an_error(config: VllmConfig) -> None:
    core = Core(config)
    request = core.add("before", SHORT)
    request.resumable = True
    core.scheduler.finish_requests("before", RequestStatus.FINISHED_ABORTED)
    request.status = RequestStatus.WAITING
    core.scheduler.add_request(request)
    core.step()
    assert core.ended == {"before": "error"}


def test_the_quota_is_the_one_that_was_resolved(qwen2: Path) -> None:
    """With `--max-model-len auto` the engine core shortens the length afterwards, which gave the
    scheduler another quota than the workers."""
    config = configure(qwen2, max_model_len=4096, budget={"page_quota": None, "quota_ratio": 0.05})
    resolved = quota_of(config)
    assert resolved.blocks == 25
    config.model_config.max_model_len = 800
    core = Core(config)
    core.add("r", 700)
    core.run()
    blocks = max(len(ids) for ids in blocks_of(core, "r"))
    assert quota_of(config) == core.scheduler.quota == resolved
    assert blocks == resolved.blocks


def test_it_travels_to_other_processes(config: VllmConfig) -> None:
    assert quota_of(pickle.loads(pickle.dumps(config))) == quota_of(config)
    assert quota_of(config).retrieves
    assert replace(quota_of(config), retrieves=False) != quota_of(config)


def blocks_of(core: Core, request_id: str) -> list[list[int]]:
    """Blocks of a request as the worker was told, after each step."""
    held: list[list[int]] = [[]]
    for scheduled in core.outputs:
        for new in scheduled.scheduled_new_reqs:
            if new.req_id == request_id:
                held.append(list(new.block_ids[0]))
        cached = scheduled.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name == request_id and ids is not None:
                held.append(held[-1] + list(ids[0]))
    return held


def test_a_quota_that_holds_every_request_is_said(
    qwen2: Path, heard: pytest.LogCaptureFixture
) -> None:
    config = configure(qwen2, max_model_len=4096)
    config.model_config.max_model_len = 96
    Core(config)
    assert "the quota holds the 96 tokens of --max-model-len" in heard.text


@pytest.mark.parametrize("policy", ["window", "hybrid"])
def test_output_is_computed_again_as_decode_reads_it(qwen2: Path, policy: str) -> None:
    """`hybrid` reads some pages only in decode, so it decodes again; `window` takes chunks."""
    core = Core(configure(qwen2, policy))
    core.add("r", LONG, output_tokens=40)
    while len(core.tokens.get("r", [])) < 30:
        core.step()
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    seen = len(core.ends["r"])
    core.run()
    again = [end for end in core.ends["r"][seen:] if LONG <= end <= LONG + 28]
    steps = {stop - start for start, stop in pairwise(again)}
    assert steps == ({1} if policy == "hybrid" else {8})
    assert core.tokens["r"] == [*range(40)]


@pytest.mark.parametrize("seed", range(8))
def test_everyone_is_served_whoever_leaves_or_is_preempted(config: VllmConfig, seed: int) -> None:
    """Random lengths, pictures, aborts and preemptions over a pool of three quotas."""
    chance = random.Random(seed)
    core = Core(config, pool_blocks=40, encoder_embeds=60)
    aborted = set()
    for number in range(25):
        images = [image(10, 48, f"i{number}"), image(60, 30, f"j{number % 3}")]
        prompt_tokens = chance.choice([4, 90, 100, 250])
        core.add(
            f"r{number}",
            prompt_tokens,
            output_tokens=chance.randint(1, 30),
            images=images if prompt_tokens > 90 else [],
        )
        for _ in range(chance.randint(0, 8)):
            core.step()
        if chance.random() < 0.2:
            aborted.add(f"r{number}")
            core.scheduler.finish_requests(f"r{number}", RequestStatus.FINISHED_ABORTED)
        if chance.random() < 0.3:
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    assert aborted | core.ended.keys() == {f"r{number}" for number in range(25)}
    assert all(tokens == [*range(len(tokens))] for tokens in core.tokens.values())
    assert not core.scheduler._manager._expected and not core.scheduler.lookaheads.parents
