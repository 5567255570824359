"""Chunks that attend to all of their prompt: the attention of the full cache, under the quota."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from tests.cache.client import Client, Feature
from tests.cache.test_recall import NUMBERS, RECALL, RecallLab, make_lab, run
from tests.cache.test_replay import FamilyLab, kept, look_ahead, prefill
from tests.cache.test_scenarios import assert_empty, play
from tests.cache.test_second_look import NEEDLE, needle_lab
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.policy import PolicyOptions
from vllm_budgetkv.policy.hybrid import HybridPolicy

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation, Retention

SCENARIOS = 60


class StreamingLab(FamilyLab):
    """What streams is compared with dense attention over all tokens in front of it."""

    rereading: ClassVar[dict[str, Any]] = {}
    num_streamed = 0
    num_mixed = 0

    def __init__(self, policy: str, quota: Quota, **kwargs: Any) -> None:
        assert quota.recall is not None
        numbers = vars(quota) | {"recall": replace(quota.recall, **self.rereading)}
        smallest = Quota(**(numbers | {"blocks": 10**6})).min_blocks
        numbers["blocks"] = max(quota.blocks, smallest)
        kwargs["pool_blocks"] = max(kwargs["pool_blocks"], 5 * numbers["blocks"])
        super().__init__(policy, Quota(**numbers), **kwargs)

    def streaming_tokens(self, client: Client) -> int:
        return self.cache.plans[client.request_id].streaming_tokens

    def _expected(self, rows: list[Client], starts: torch.Tensor, layer: int, *qkv: Any) -> Any:
        out, query = super()._expected(rows, starts, layer, *qkv), qkv[0]
        for row, client in enumerate(rows):
            if count := self.streaming_tokens(client):
                tokens = slice(int(starts[row + 1]) - count, int(starts[row + 1]))
                out[tokens] = self.dense(client, layer, query[tokens])
        return out

    def dense(self, client: Client, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of a client's last tokens, [t, Hq, D], to all tokens up to themselves."""
        keys, values = self.shadow[client.request_id, layer].unbind(1)
        asking, seen = len(query), len(keys)
        keys, values = (x.transpose(0, 1).repeat_interleave(self.group, 0) for x in (keys, values))
        mask = torch.ones(asking, seen, dtype=torch.bool).tril(seen - asking)
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), keys, values, attn_mask=mask, scale=self.head_size**-0.5
        ).transpose(0, 1)

    def _check_attention(
        self, client: Client, layer: int, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        if not self.streaming_tokens(client):
            super()._check_attention(client, layer, query, out)

    def run_layer(self, step: Any, layer: int, *tensors: torch.Tensor) -> None:
        super().run_layer(step, layer, *tensors)
        query, _, _, out = tensors
        clients = {client.request_id: client for client in self.clients}
        for stream in step.streams:
            client = clients[stream.request.request_id]
            expected = self.dense(client, layer, query[stream.tokens])
            torch.testing.assert_close(out[stream.tokens], expected, rtol=1e-4, atol=1e-4)
            self.num_streamed += len(expected)
        self.num_mixed += 0 < len(step.streams) < len(step.plans)


class AllLab(StreamingLab):
    rereading: ClassVar = {"rereads_all": True}


class QuestionLab(StreamingLab):
    rereading: ClassVar = {"question_tokens": 20}


@pytest.mark.parametrize("block", range(4))
def test_random_scenarios(block: int) -> None:
    """Random chunks, families, aborts and preemptions; the ledger and poison are on."""
    count, streamed, mixed = SCENARIOS // 4, 0, 0
    for seed in range(block * count, (block + 1) * count):
        lab = make_lab(seed, AllLab if seed % 3 else QuestionLab)
        play(lab, num_steps=45)
        assert_empty(lab)
        streamed += lab.num_streamed
        mixed += lab.num_mixed
    assert streamed > 100 * count
    assert mixed > count


REREADS_ALL = {"rereads_all": True}


def streaming_lab(
    recall: dict[str, Any], *, tier_blocks: int = 100, **changes: Any
) -> StreamingLab:
    quota = Quota(**(NUMBERS | changes), recall=replace(RECALL, **recall))
    return StreamingLab("hybrid", quota, pool_blocks=60, heads=2, tier_blocks=tier_blocks)


@pytest.mark.parametrize("interval_tokens", [1, 8, 20])
def test_every_chunk_attends_to_all(interval_tokens: int) -> None:
    """In pieces of one page, of the layers' growth, and in fewer; up to the prompt's last token."""
    lab = streaming_lab(REREADS_ALL, decode_interval_tokens=interval_tokens, blocks=16)
    assert lab.quota.piece_pages == max(1, 3 * interval_tokens // 8)
    client = Client("long", 300)
    while client.computed_tokens < 300:
        lab.step({client: lab.room(client)})
        # what stays is chosen behind the first token
        assert lab.state(client).postponed and not lab.state(client).recalls
        assert not lab.cache.tables.lens[lab.state(client).slot].any()
    assert lab.num_streamed == lab.layers * 300
    run(lab, client, outputs=3)
    assert not lab.state(client).postponed and lab.state(client).recalls
    assert lab.num_streamed == lab.layers * 300


def behind_a_prompt(lab: RecallLab, client: Client) -> tuple[list[list[list[int]]], list[Any]]:
    """What is kept of a prompt, and of two tokens more, and the classes of the heads."""
    look_ahead(lab, client)
    return chosen(lab, run(lab, prefill(lab, client), outputs=3))


def chosen(lab: RecallLab, client: Client) -> tuple[list[list[list[int]]], list[Any]]:
    return kept(lab, client), lab.cache.tables.is_static[lab.state(client).slot].tolist()


def asking_lab(recall: dict[str, Any], shared_tokens: int) -> StreamingLab:
    """Two clients with the same content, of which the second finds what it shares of it."""
    quota = Quota(**NUMBERS, recall=replace(RECALL, **recall))
    sizes = {"pool_blocks": 60, "heads": 2, "tier_blocks": 200}
    # a threshold between the heads, and so much hysteresis that it matters what a head was before
    options = PolicyOptions(probe_tokens=4, static_threshold=0.47, hysteresis=0.1)
    lab = StreamingLab("hybrid", quota, options=options, **sizes)
    lab.rereading = recall
    lab.families = {"first": ("second", shared_tokens), "second": ("second", shared_tokens)}
    if shared_tokens:
        prefill(lab, Client("first", 300))
    return lab


@pytest.mark.parametrize(
    ("recall", "shared_tokens", "chooses"),
    [
        (REREADS_ALL, 100, True),
        (REREADS_ALL, 250, True),
        ({"question_tokens": 4}, 299, True),
        ({"question_tokens": 4}, 250, True),
        ({"question_tokens": 4}, 0, True),
        ({"question_tokens": 100}, 250, True),
        ({}, 299, False),
    ],
    ids=str,
)
def test_what_stays_is_chosen_behind_the_prompt(
    recall: dict[str, Any], shared_tokens: int, *, chooses: bool
) -> None:
    """The same of a prompt that was computed, of one that was found, in part or but for its
    question, and of one that was preempted."""
    alone = asking_lab(REREADS_ALL, 0)
    expected = behind_a_prompt(alone, Client("second", 300))
    lab, client = asking_lab(recall, shared_tokens), Client("second", 300)
    found = behind_a_prompt(lab, client)
    assert lab.found_first["second"] >= shared_tokens // 8 * 8 - 8
    if not chooses:
        assert found != expected
        return
    assert found == expected
    lab.give_blocks(client)
    lab.step({}, preempted=(client.request_id,))
    while client.computed_tokens < 302:
        lab.step({client: lab.room(client)})
    assert chosen(lab, client) == expected


@pytest.mark.parametrize("shared_tokens", [0, 250, 299])
def test_classes_before_the_choice_have_no_say_in_it(
    shared_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: heads that were classified by the look-ahead's question passed their class on to the
    choice by the question where it stands, so a prompt that was computed, compressed on its way,
    answered otherwise than one that was found."""
    lab, client = asking_lab({"question_tokens": 4}, shared_tokens), Client("second", 300)
    look_ahead(lab, client)
    told: list[tuple[int, bool]] = []
    retain = HybridPolicy.retain

    def telling(self: HybridPolicy, observation: Observation) -> Retention:
        told.append((lab.state(client).computed_tokens, observation.was_static is None))
        return retain(self, observation)

    monkeypatch.setattr(HybridPolicy, "retain", telling)
    prefill(lab, client)
    told.clear()
    run(lab, client, outputs=3)
    # every layer is filled from nothing; its heads have a class from the first compression on
    knows_nothing = [new for tokens, new in told if tokens == told[0][0]]
    assert len(knows_nothing) >= lab.layers and all(knows_nothing)
    assert not all(new for _, new in told)


OWN_TOKENS = 8


def asked(*, shared_tokens: int, looks_ahead: bool, enough_tokens: int) -> Any:
    """What stays of a prompt with `OWN_TOKENS` behind its video and room for more to ask."""
    quota = Quota(**NUMBERS, recall=replace(RECALL, question_tokens=20))
    lab = StreamingLab(
        "hybrid",
        quota,
        options=PolicyOptions(probe_tokens=OWN_TOKENS + 4),
        pool_blocks=60,
        heads=2,
        tier_blocks=200,
    )
    video = Feature(12, 280, 8)
    terms = replace(
        lab.cache.slots.rules.offers[0].terms, replaces_ahead=True, enough_tokens=enough_tokens
    )
    lab.families = dict.fromkeys(("first", "second"), ("second", shared_tokens or 300))
    if shared_tokens:
        prefill(lab, Client("first", 300, [video], terms=terms))
    client = Client("second", 300, [video], terms=terms)
    if looks_ahead:
        look_ahead(lab, client)
    return chosen(lab, run(lab, prefill(lab, client), outputs=3))


@pytest.mark.parametrize("shared_tokens", [0, 200, 292])
def test_a_question_that_was_read_asks_alone(shared_tokens: int) -> None:
    """So a prompt that was found needs no look-ahead to keep what a computed one does."""
    expected = asked(shared_tokens=0, looks_ahead=True, enough_tokens=OWN_TOKENS)
    assert asked(shared_tokens=292, looks_ahead=False, enough_tokens=OWN_TOKENS) == expected
    found = {"shared_tokens": shared_tokens, "looks_ahead": True}
    assert asked(**found, enough_tokens=OWN_TOKENS) == expected
    # too short to be a question, it asks beside what ran ahead
    assert asked(**found, enough_tokens=OWN_TOKENS + 1) != expected


def test_steps_that_recall_are_those_behind_the_prompt() -> None:
    lab = streaming_lab({"question_tokens": 20})
    client = run(lab, Client("long", 300), outputs=6)
    lab.step({}, finished=(client.request_id,))
    (record,) = lab.finished
    assert record.output_tokens == 6
    # the first token follows from the prompt, and the last was never computed
    assert record.recall_steps == 5
    assert record.recalled_tokens > 0


def test_the_question_finds_what_the_look_ahead_missed() -> None:
    lab = needle_lab(second_look=False, kind=AllLab)
    client = Client("long", 300)
    look_ahead(lab, client)
    run(lab, client, outputs=2)
    found = [NEEDLE in held for heads in kept(lab, client) for held in heads]
    assert all(found)


def test_a_prompt_that_host_memory_has_no_room_for_does_not_stream() -> None:
    lab = streaming_lab(REREADS_ALL, tier_blocks=2)
    run(lab, Client("long", 300), outputs=2)
    assert lab.num_streamed == 0


@pytest.mark.parametrize(
    ("features", "first_token"),
    [([], 280), ([Feature(4, 160, 8)], 164), ([Feature(4, 10, 1), Feature(40, 249, 1)], 289)],
    ids=["text", "video", "picture at the end"],
)
def test_the_question_attends_to_all(features: list[Feature], first_token: int) -> None:
    """Tokens behind the last picture, or the last ones of text, once something was dropped."""
    lab = streaming_lab({"question_tokens": 20})
    client = Client("long", 300, features)
    while client.computed_tokens < 300:
        start, before = client.computed_tokens, lab.num_streamed
        has_dropped = lab.state(client).has_classes if start else False
        lab.step({client: lab.room(client)})
        asking = max(0, client.computed_tokens - max(first_token, start)) * has_dropped
        assert lab.num_streamed - before == lab.layers * asking, start
    assert lab.num_streamed > 0


def test_without_it_chunks_attend_to_what_is_held() -> None:
    lab = streaming_lab({})
    run(lab, Client("long", 300), outputs=1)
    assert lab.num_streamed == 0


@pytest.mark.parametrize("num_layers", [1, 2, 30])
@pytest.mark.parametrize("interval_tokens", [1, 5, 64])
def test_a_piece_fits_beside_what_is_held(num_layers: int, interval_tokens: int) -> None:
    """Budget, chunk, partial pages and a piece: all pages of the quota at most."""
    numbers = NUMBERS | {"num_layers": num_layers, "decode_interval_tokens": interval_tokens}
    recall = replace(RECALL, all_heads=2 * num_layers, rereads_all=True)
    for blocks in range(20, 60):
        quota = Quota(**(numbers | {"blocks": blocks}), recall=recall)
        held_pages = num_layers * (quota.budget_tokens / 8 + 1) + quota.chunk_tokens / 8
        assert quota.piece_pages >= 1
        assert held_pages + quota.piece_pages <= num_layers * blocks
