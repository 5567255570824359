"""A real server whose clients ask for terms of their own, and read what they got in the answer."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from benchmarks.server import Server
from tests.e2e.job import content_of
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS, VIDEO, wait_until_idle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openai import OpenAI

pytestmark = pytest.mark.engine

LARGEST = 16
# 10,000 were sent in one go; every run sends some
NUM_BODIES = int(os.environ.get("BUDGETKV_FUZZED_BODIES", "400"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> Iterator[Server]:
    offers = ["--kv-max-page-quota", str(LARGEST), "--kv-request-policies", "full,window"]
    log = tmp_path_factory.mktemp("requests") / "server.log"
    with Server(str(vision_model), [*ARGUMENTS, *offers], log, dict(os.environ)) as running:
        yield running


def ask(
    client: OpenAI,
    parts: list[dict[str, Any]] = VIDEO,
    stop: list[str] | None = None,
    **asked: Any,
) -> Any:
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [content_of(part) for part in parts]}],
        max_tokens=12,
        temperature=0.0,
        stop=stop,
        extra_body={"ignore_eos": True, "vllm_xargs": asked},
    )


def said(answer: Any) -> dict[str, Any]:
    return answer.kv_transfer_params["budgetkv"]


def test_an_answer_says_what_it_was_held_to(server: Server) -> None:
    """All of them at once, each with its own terms."""
    client = server.client()
    asks = [
        {},
        {"kv_page_quota": 10},
        {"kv_page_quota": LARGEST, "kv_pin": "0:8"},
        {"kv_policy": "window"},
    ]
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(pool.map(lambda asked: ask(client, **asked), asks))
    quotas = [said(answer)["quota_blocks"] for answer in answers]
    assert quotas == [said(answer)["peak_blocks"] for answer in answers]
    assert quotas == [QUOTA_BLOCKS, 10, LARGEST, QUOTA_BLOCKS]
    assert [said(answer)["policy"] for answer in answers] == ["hybrid"] * 3 + ["window"]
    for answer in answers:
        assert said(answer)["prompt_tokens"] == answer.usage.prompt_tokens
        assert said(answer)["full_cache_blocks"] > 60, "the video must not fit the pool"
        assert said(answer)["prompt_compressions"] > 10
    hybrid, window = said(answers[0]), said(answers[3])
    assert 0 < hybrid["retained_mass"] < 1 and window["retained_mass"] is None
    assert set(hybrid["kept_tokens_per_head"]) <= {"static", "dynamic"}


def test_the_full_cache_on_a_server_of_quotas(server: Server) -> None:
    client = server.client()
    short = [{"image": 2}, {"text": "Where?"}]
    full, plain = ask(client, short, kv_policy="full"), ask(client, short)
    assert full.choices[0].message.content == plain.choices[0].message.content
    assert (said(full)["policy"], said(full)["quota_blocks"]) == ("full", None)
    with pytest.raises(openai.BadRequestError, match=r"must fit the pool of 472"):
        ask(client, kv_policy="full")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kv_page_quota": LARGEST + 1}, r"kv_page_quota must be from \d to 16 blocks of 8 tokens"),
        ({"kv_page_quota": "12"}, "must be a whole number"),
        ({"kv_policy": "snapkv"}, "kv_policy must be hybrid or full or window"),
        ({"kv_pin": "0:100000"}, "but the prompt has"),
        ({"kv_pages": 4}, "kv_pages is nothing that a request may ask for"),
    ],
)
def test_a_mistake_is_the_clients_and_names_what_may_be(
    server: Server, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(server.client(), [{"text": "Hi"}], **asked)


def test_a_client_that_corrects_its_mistake_gets_its_answer(server: Server) -> None:
    """A picture that came with it must be sent to the engine again, which never got it."""
    client = server.client()
    new = [{"video": 24, "seed": 77}, {"text": "Which letter?"}]
    with pytest.raises(openai.BadRequestError, match="kv_page_quota must be from"):
        ask(client, new, kv_page_quota=1)
    assert said(ask(client, new, kv_page_quota=10))["quota_blocks"] == 10


def test_an_answer_that_ends_at_a_stop_string_has_its_report(server: Server) -> None:
    client = server.client()
    whole = ask(client)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2]
    stopped = ask(client, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    for name in ("quota_blocks", "peak_blocks", "prompt_tokens", "kept_tokens_per_head"):
        assert said(stopped)[name] == said(whole)[name]
    assert said(stopped)["full_cache_blocks"] <= said(whole)["full_cache_blocks"]


def test_completions_and_responses_take_them_too(server: Server) -> None:
    client = server.client()
    model = client.models.list().data[0].id
    body = {"ignore_eos": True, "vllm_xargs": {"kv_page_quota": 10}}
    text = "word " * 150
    completion = client.completions.create(
        model=model, prompt=text, max_tokens=4, temperature=1.0, n=2, extra_body=body
    )
    response = client.responses.create(
        model=model, input=text, max_output_tokens=4, temperature=0.0, extra_body=body
    )
    for answer in (completion, response):
        assert (said(answer)["quota_blocks"], said(answer)["peak_blocks"]) == (10, 10)
    bad = {"vllm_xargs": {"kv_page_quota": 1}}
    with pytest.raises(openai.BadRequestError, match="kv_page_quota must be from"):
        client.completions.create(model=model, prompt="a", max_tokens=1, extra_body=bad)
    with pytest.raises(openai.BadRequestError, match="kv_page_quota must be from"):
        client.responses.create(model=model, input="a", max_output_tokens=1, extra_body=bad)


def test_a_stream_goes_on_without_a_report(server: Server) -> None:
    """vLLM has no place for it in a stream; the report file has it."""
    client = server.client()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"kv_page_quota": 10}},
    )
    assert sum(bool(event.choices and event.choices[0].delta.content) for event in stream) >= 1


def random_value(chance: random.Random) -> Any:
    values = [
        *(-1, 0, 1, 9, 10, 12, 16, 17, 2**63, -(2**63), 10**40, 1.5, 12.0, 1e308, True, None),
        *("", "full", "window", "hybrid", "snapkv", "0:4", "0:4,6:9", "4:0", "a:b", "0:999999999"),
        *("question", "text", "x" * 3000, "\x00", "é", "٣", [], ["0:2", "3:4"], [1, 2.0, "a"]),
        *([["nested"]], {"a": 1}, "0:1," * 200),
    ]
    return chance.choice(values)


def random_body(chance: random.Random) -> dict[str, Any]:
    keys = ["kv_policy", "kv_page_quota", "kv_pin", "kv_lookahead", "kv_lookahead_source"]
    keys += ["kv_reuse", "kv_", "other", "KV_PIN"]
    chosen = chance.sample(keys, chance.randint(0, 4))
    return {key: random_value(chance) for key in chosen}


def test_whatever_is_asked_the_server_lives(server: Server) -> None:
    client = server.client()
    chance = random.Random(0)

    def send(body: dict[str, Any]) -> int:
        text = [{"text": "word " * (1 if len(body) % 2 else 60)}]
        try:
            ask(client, text, **body)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    bodies = [random_body(chance) for _ in range(NUM_BODIES)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(send, bodies))
    assert set(codes) == {200, 400}, json.dumps(
        [body for body, code in zip(bodies, codes, strict=True) if code not in (200, 400)][:3]
    )
    wait_until_idle(server)
    assert ask(client, [{"text": "Hi"}]).usage.completion_tokens == 12
