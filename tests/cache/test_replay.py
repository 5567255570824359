"""What a prompt takes over from host memory: content, equality with a prefill, isolation."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client, Feature
from tests.cache.test_recall import MAX_TOKENS, NUMBERS, RECALL, RecallLab, make_lab, run, small_lab
from tests.cache.test_scenarios import assert_empty, play
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.replayed import replay_stops
from vllm_budgetkv.policy import PolicyOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace

SCENARIOS = 300


class FamilyLab(RecallLab):
    """Most clients of `play` begin as another one does."""

    num_taken = 0
    num_tails = 0

    def arrive(self, client: Client) -> None:
        if client.request_id not in self.families:
            chance = random.Random(client.request_id)
            family = chance.choice(["one", "two", "three"])
            shared_tokens = chance.choice([0, chance.randint(1, MAX_TOKENS), MAX_TOKENS])
            self.families[client.request_id] = (family, min(shared_tokens, client.prompt_tokens))
        super().arrive(client)

    def host_place(self, client: Client) -> HostPlace | None:
        place = super().host_place(client)
        self.num_taken += place is not None and place.num_tokens > 0
        self.num_tails += place is not None and place.tail_block is not None
        return place


@pytest.mark.parametrize("block", range(4))
def test_random_scenarios(block: int) -> None:
    """The lab compares every held token with its content, so nothing of another may be among it."""
    count, taken, tails = SCENARIOS // 4, 0, 0
    for seed in range(block * count, (block + 1) * count):
        lab = make_lab(seed, FamilyLab)
        play(lab, num_steps=45)
        assert_empty(lab)
        assert lab.prompts.blocks.num_unheld == lab.tier_blocks
        taken += lab.num_taken
        tails += lab.num_tails
    assert taken > count
    assert tails > count // 4


def natural_stops(lab: RecallLab, prompt_tokens: int) -> Iterator[int]:
    stop = 0
    while (stop := lab.quota.next_stop(stop, prompt_tokens)) < lab.quota.chunks_end(prompt_tokens):
        yield stop


def prefill(lab: RecallLab, client: Client) -> Client:
    """Chunks end where the engine ends them."""
    lab.room(client)
    while client.computed_tokens < lab.quota.chunks_end(client.prompt_tokens):
        stop = lab.quota.next_stop(client.computed_tokens, client.prompt_tokens)
        lab.step({client: stop - client.computed_tokens})
    return client


def look_ahead(lab: RecallLab, client: Client) -> None:
    """Its question, the same in every lab."""
    ahead = Client(client.request_id + LOOKAHEAD, 5)
    lab.step({ahead: 5})
    lab.give_blocks(ahead)
    lab.step({}, finished=(ahead.request_id,))


class NaturalLab(RecallLab):
    def random_stops(self, num_tokens: int) -> Iterator[int]:
        yield from (stop for stop in natural_stops(self, MAX_TOKENS) if stop <= num_tokens)


def natural_lab(*, room_blocks: int = 0, **options: Any) -> NaturalLab:
    """`room_blocks`: for larger chunks, beside what leaves the same budget."""
    quota = Quota(**NUMBERS, recall=RECALL)
    if room_blocks:
        grown_tokens = quota.decode_interval_tokens + room_blocks * quota.page_tokens
        more = {"blocks": quota.blocks + room_blocks, "decode_interval_tokens": grown_tokens}
        quota = replace(quota, **more)
    known = PolicyOptions(probe_tokens=4, **options)
    sizes = {"pool_blocks": 70, "heads": 2, "tier_blocks": 200, "options": known}
    return NaturalLab("hybrid", quota, **sizes)


VIDEO = Feature(4, 160, 8)


def ask(lab: RecallLab, shared_tokens: int, name: str) -> Client:
    """The prefill of a client that begins as all of them do."""
    lab.families[name] = ("video", shared_tokens)
    client = Client(name, 300, [VIDEO])
    look_ahead(lab, client)
    return prefill(lab, client)


def kept(lab: RecallLab, client: Client) -> list[list[list[int]]]:
    """By layer and head, without what was recalled, which hangs on all layers."""
    return [
        [
            lab.held(client, layer, head).tolist()[lab.num_recalled(client, layer, head) :]
            for head in range(lab.heads)
        ]
        for layer in range(lab.layers)
    ]


def holdings(lab: RecallLab, client: Client) -> list[list[int]]:
    layers, heads = range(lab.layers), range(lab.heads)
    return [lab.held(client, layer, head).tolist() for layer in layers for head in heads]


LENGTHS = pytest.mark.parametrize("shared_tokens", [8, 100, 168, 170, 250, 290])


@LENGTHS
def test_it_holds_what_a_prefill_would_hold(shared_tokens: int) -> None:
    """In the same chunks, at every length that is taken over: in whole ones, and with a lead."""
    labs = [natural_lab() for _ in range(2)]
    ask(labs[1], shared_tokens, "first")
    # as if nothing had been there when it was admitted first
    labs[1].found_first["second"] = 0
    clients = [ask(lab, shared_tokens, "second") for lab in labs]
    found = [lab.found["second"].num_tokens for lab in labs]
    assert found == [0, shared_tokens // 8 * 8]
    alone, behind = (holdings(*pair) for pair in zip(labs, clients, strict=True))
    assert alone == behind
    states = [lab.cache.slots.requests["second"] for lab in labs]
    assert states[0].compressions == states[1].compressions
    classes = [
        lab.cache.tables.is_static[state.slot] for lab, state in zip(labs, states, strict=True)
    ]
    assert torch.equal(*classes)
    sizes = [lab.recaller.num_recalled[state.slot] for lab, state in zip(labs, states, strict=True)]
    assert torch.equal(*sizes)


@LENGTHS
@pytest.mark.parametrize("layer", range(3))
def test_each_layer_holds_what_a_prefill_in_its_joined_chunks_would(
    shared_tokens: int, layer: int
) -> None:
    """A prefill under a larger quota with the same budget has room for them, in all layers."""
    lab, roomy = natural_lab(), natural_lab(room_blocks=20)
    assert lab.quota.budget_tokens == roomy.quota.budget_tokens
    ask(lab, shared_tokens, "first")
    second = ask(lab, shared_tokens, "second")
    found = lab.found["second"].num_tokens
    assert found == shared_tokens // 8 * 8
    roomy.families = lab.families
    alone = Client("second", 300, [VIDEO])
    look_ahead(roomy, alone)
    roomy.room(alone)
    natural = list(natural_stops(lab, 300))
    joined = list(replay_stops(lab.quota, layer, [s for s in natural if s <= found], found))
    for stop in (*joined, *(s for s in natural if s > found), lab.quota.chunks_end(300)):
        roomy.step({alone: stop - alone.computed_tokens})
    assert kept(lab, second)[layer] == kept(roomy, alone)[layer]
    classes = [
        one.cache.tables.is_static[one.state(client).slot, layer].tolist()
        for one, client in ((lab, second), (roomy, alone))
    ]
    assert classes[0] == classes[1]
    if layer == lab.layers - 1:
        # the last layer is compressed the most often
        assert lab.state(second).compressions == roomy.state(alone).compressions


def test_a_third_client_holds_what_the_second_holds() -> None:
    lab = natural_lab()
    ask(lab, 200, "first")
    lab.contents |= {("third", layer): lab.content("second", layer) for layer in range(lab.layers)}
    ahead = (f"{name}{LOOKAHEAD}" for name in ("second", "third"))
    second, third = ([lab.content(name, layer) for layer in range(lab.layers)] for name in ahead)
    for one, other in zip(third, second, strict=True):
        one.copy_(other)
    clients = [ask(lab, 200, name) for name in ("second", "third")]
    assert [lab.found[client.request_id].num_tokens for client in clients] == [200, 200]
    assert holdings(lab, clients[0]) == holdings(lab, clients[1])
    joined, natural = lab.state(clients[0]).compressions, len([*natural_stops(lab, 300)])
    assert joined < natural - 4


@pytest.mark.parametrize("shared_tokens", [0, 8, 100, 170, 250])
def test_a_preempted_request_holds_what_it_held(shared_tokens: int) -> None:
    """It resumes from what it wrote, compressed where it was: joined chunks and its own."""
    lab = natural_lab()
    ask(lab, shared_tokens, "first")
    client = run(lab, ask(lab, shared_tokens, "second"), outputs=4)
    assert lab.found["second"].num_tokens == shared_tokens // 8 * 8
    before = holdings(lab, client)
    lab.give_blocks(client)
    lab.step({}, preempted=(client.request_id,))
    lab.room(client)
    assert client.computed_tokens == 300 - lab.options.probe_tokens
    lab.step({client: lab.room(client)})
    while client.computed_tokens < 303:
        lab.step({client: lab.room(client)})
    assert holdings(lab, client) == before
    lab.step({}, finished=(client.request_id,))
    assert lab.finished[-1].reused_tokens == 296 + shared_tokens // 8 * 8


def test_the_largest_position_of_a_lead_counts() -> None:
    """The probe stands behind the tokens of the whole chunk, as in a prefill."""
    lab = natural_lab()
    lab.families = dict.fromkeys(("first", "second"), ("video", 282))
    prefill(lab, Client("first", 300))
    second = Client("second", 300)
    lab.room(second)
    assert second.lead_tokens > 0
    tier, slot = lab.recaller.tier, 0
    place = lab.host_place(second)
    assert place is not None
    tier.enter(slot, place)
    # a picture whose last rows are far from its start has later tokens nearer to the text
    tier.places[place.blocks[second.computed_tokens // 8 - 1], 3] = 1000
    lab.prompts.leave("second")
    look_ahead(lab, second)
    lab.step({second: lab.room(second)})
    stop = second.computed_tokens
    assert int(lab.state(second).position_offset) == 1001 - stop


def test_a_block_in_use_is_given_to_nobody_else() -> None:
    lab = small_lab(tier_blocks=40)
    first = run(lab, Client("first", 300), outputs=1)
    second = run(lab, Client("second", 300), outputs=1)
    assert lab.state(first).in_tier and not lab.state(second).in_tier


def test_what_was_left_longest_ago_goes_first() -> None:
    lab = small_lab(tier_blocks=80)
    for name in ("first", "second", "third"):
        lab.give_blocks(run(lab, Client(name, 300), outputs=1))
        lab.step({}, finished=(name,))
    found = []
    for name in ("first", "second", "third"):
        again = Client(name, 300)
        lab.arrive(again)
        found.append(lab.found[name].num_tokens)
    # the third took what was free and the end of the first, whose beginning is of use without it
    assert found == [40, 296, 296]


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 200])
def test_nothing_of_another_content_is_found(num_tokens: int) -> None:
    lab = small_lab(tier_blocks=200)
    lab.families = dict.fromkeys(("first", "second"), ("video", num_tokens))
    run(lab, Client("first", 300), outputs=1)
    lab.arrive(Client("second", 300))
    assert lab.found["second"].num_tokens == num_tokens // 8 * 8


def test_the_end_of_an_item_inside_a_block_is_found() -> None:
    lab = small_lab(tier_blocks=200)
    lab.families = dict.fromkeys(("first", "second"), ("video", 165))
    video = Feature(5, 160, 8)
    run(lab, Client("first", 300, [video]), outputs=1)
    second = Client("second", 300, [video])
    run(lab, second, outputs=3)
    assert lab.found["second"].num_tokens == 165
    assert lab.found["second"].tail_block is not None


def test_an_index_that_is_too_large_keeps_nobody_from_reuse() -> None:
    recall = replace(RECALL, max_index_share=0.001)
    lab = small_lab(recall, tier_blocks=200)
    lab.families = dict.fromkeys(("first", "second"), ("video", 200))
    for name in ("first", "second"):
        run(lab, Client(name, 300), outputs=3)
    lab.step({}, finished=("first", "second"))
    records = {record.request_id: record for record in lab.finished}
    assert {record.recall for record in lab.finished} == {"index too large"}
    assert [records[name].reused_tokens for name in ("first", "second")] == [0, 200]
