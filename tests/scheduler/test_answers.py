"""What an answer says of its request, as the engine core gives it to the front end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import BLOCK_TOKENS, BUDGET, Core, configure
from tests.scheduler.test_request_terms import add
from vllm_budgetkv.arithmetic.recalled import Recalled
from vllm_budgetkv.metrics.message import Followed, Message

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

LONG, SHORT = 250, 20
TOLD = {"dynamic_share": 0.25, "prompt_compressions": 10}


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    return configure(qwen2, "hybrid", budget={"request_policies": "full"})


def said(core: Core, name: str) -> Any:
    found = core.said[name]
    assert found is not None and list(found) == ["budgetkv"]
    return found["budgetkv"]


def test_it_says_what_the_request_held(config: VllmConfig) -> None:
    core = Core(config)
    core.tells["long"] = TOLD
    add(core, "long", LONG, output_tokens=30)
    add(core, "short", SHORT)
    add(core, "full", LONG, kv_policy="full")
    core.run()
    full_blocks = -(-(LONG + 3) // BLOCK_TOKENS)
    assert said(core, "long") == {
        "policy": "hybrid",
        "quota_blocks": BUDGET["page_quota"],
        "block_tokens": BLOCK_TOKENS,
        "peak_blocks": BUDGET["page_quota"],
        "full_cache_blocks": -(-(LONG + 29) // BLOCK_TOKENS),
        "prompt_tokens": LONG,
        "preemptions": 0,
        # of 29 tokens that came behind the prompt
        "output_compactions": 28 // BUDGET["decode_interval_tokens"],
        **TOLD,
    }
    assert said(core, "short")["peak_blocks"] == -(-(SHORT + 3) // BLOCK_TOKENS)
    assert said(core, "short")["output_compactions"] == 0
    full = said(core, "full")
    assert (full["policy"], full["quota_blocks"]) == ("full", None)
    assert full["peak_blocks"] == full["full_cache_blocks"] == full_blocks
    assert len(core.said) == 3, "a look-ahead has no answer"
    assert not core.scheduler._answers._fields


def test_the_peak_is_that_of_before_a_preemption_too(config: VllmConfig) -> None:
    core = Core(config)
    add(core, "r", SHORT, output_tokens=60)
    for _ in range(45):
        core.step()
    held = core.scheduler._manager.peak_blocks("r")
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.step()
    assert core.scheduler._manager.peak_blocks("r") == held > -(-SHORT // BLOCK_TOKENS)
    core.run()
    assert said(core, "r")["preemptions"] == 1


def test_it_can_be_switched_off(qwen2: Path) -> None:
    core = Core(configure(qwen2, "hybrid", budget={"answer_report": False}))
    core.tells["r"] = TOLD
    add(core, "r", LONG)
    core.run()
    assert core.said == {"r": None}


def test_nothing_is_kept_of_one_that_is_aborted(config: VllmConfig) -> None:
    core = Core(config)
    core.tells["r"] = TOLD
    add(core, "r", LONG, output_tokens=50)
    for _ in range(20):
        core.step()
    assert core.scheduler._answers._fields
    core.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert not core.scheduler._answers._fields and not core.scheduler._answers._evicted_tokens
    assert not core.scheduler._manager._peak_blocks


@pytest.mark.parametrize("says", [True, False])
def test_a_message_for_the_metrics_travels_along(qwen2: Path, says: bool) -> None:
    """Also where the answer says nothing; the front end takes it out."""
    core = Core(configure(qwen2, "hybrid", budget={"answer_report": says}), log_stats=True)
    core.tells["r"] = TOLD | {"retained_mass": 0.5, "compression_ms": 20.0}
    add(core, "r", LONG)
    core.run()
    travels = core.said["r"]
    assert travels is not None
    message = Message.take(travels)
    assert message is not None
    assert ("budgetkv" in travels) is says and "budgetkv_meter" not in travels
    assert (message.policy, message.engine) == ("hybrid", "0")
    assert message.model_name == core.scheduler.vllm_config.model_config.served_model_name
    assert message.peak_blocks == BUDGET["page_quota"] < message.full_cache_blocks
    assert message.evicted_tokens == {"static": 3, "dynamic": 4}
    assert (message.retained_mass, message.compression_seconds) == (0.5, 0.02)


def test_the_metrics_are_told_of_host_memory(qwen2: Path) -> None:
    """Once of what came back: with the first request that ends behind the one that left."""
    budget = {"host_memory": "1MiB", "retrieval_ratio": 1.0, "probe_tokens": 32}
    core = Core(configure(qwen2, "hybrid", budget=budget), log_stats=True)
    messages = []
    for name in ("one", "two", "three"):
        core.tells[name] = TOLD
        if name == "two":
            core.recalled = Recalled(steps=4, tokens=64, moved_tokens=9, moved_bytes=2304)
        add(core, name, LONG)
        core.run()
        message = Message.take(core.said[name] or {})
        assert message is not None and message.host_blocks is not None
        messages.append(message)
    nothing = {"steps": 0, "tokens": 0, "moved_tokens": 0, "moved_bytes": 0}
    told = {"steps": 4, "tokens": 64, "moved_tokens": 9, "moved_bytes": 2304}
    assert [message.recalled for message in messages] == [nothing, told, nothing]
    one, two, _ = (message.host_blocks or {} for message in messages)
    # a request that ends has let its blocks go
    assert one["held"] == two["held"] == 0 and one["all"] == core.scheduler._host_blocks
    # whole blocks of the prompt, found again by the second
    assert one["findable"] == two["findable"] == LONG // BLOCK_TOKENS


def test_what_comes_of_one_that_was_aborted_meanwhile_is_not_kept(config: VllmConfig) -> None:
    """vLLM aborts between a step and its output."""
    core = Core(config)
    add(core, "r", LONG)
    while not core.scheduler.requests.get("r"):
        core.step()
    core.tells["r"] = TOLD
    scheduled = core.scheduler.schedule()
    assert list(scheduled.num_scheduled_tokens) == ["r"]
    core.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    core.give(scheduled)
    assert not core.scheduler._answers._fields and not core.scheduler._answers._evicted_tokens


def test_one_with_stop_strings_says_it_with_its_first_token(config: VllmConfig) -> None:
    core = Core(config, log_stats=True)
    core.tells["r"] = TOLD
    request = core.make("r", [*range(LONG)], output_tokens=6)
    request.sampling_params.stop = ["x"]
    core.scheduler.add_request(request)
    core.run()
    first, *rest, last = core.travels["r"]
    assert first["budgetkv"].items() >= TOLD.items() and not any(rest)
    message = Message.take(first)
    assert message is not None and message.grows is not None
    followed = Followed(message, first)
    for _ in range(5):
        followed.grow(1)
    assert first["budgetkv"] == last["budgetkv"]
    ended = Message.take(last)
    assert followed.message == ended
    assert not core.scheduler._answers._followed


def test_what_comes_behind_the_first_token_goes_with_the_second(config: VllmConfig) -> None:
    """Of a prompt that host memory keeps: what stays is chosen then."""
    core = Core(config, log_stats=True)
    request = core.make("r", [*range(LONG)], output_tokens=6)
    request.sampling_params.stop = ["x"]
    core.scheduler.add_request(request)
    while "r" not in core.travels:
        core.step()
    core.tells["r"] = TOLD
    core.run()
    first, second, *rest, last = core.travels["r"]
    assert not set(TOLD) & set(first["budgetkv"])
    assert second["budgetkv"].items() >= TOLD.items() and not any(rest)
    messages = [Message.take(one) for one in (first, second)]
    followed = [Followed(*pair) for pair in zip(messages, (first, second), strict=True)]
    followed[1].go_on(followed[0], 1)
    for _ in range(4):
        followed[1].grow(1)
    assert second["budgetkv"] == last["budgetkv"]
    assert followed[1].message == Message.take(last)
