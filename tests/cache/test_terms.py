"""Requests that ask for terms of their own, in one batch: each has its quota, policy and pins.

The lab checks every held token, every ledger and every budget after every layer; here its clients
differ in what they are held to.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_scenarios import QUOTA, assert_empty, play
from vllm_budgetkv.arithmetic.pinned import Pinned
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.terms import Terms
from vllm_budgetkv.cache.rules import Offer
from vllm_budgetkv.policy import make_policy

OTHERS = ("window", "snapkv", "keydiff", "pyramidkv", "streammem", "full")
LARGEST = 20
POOL_BLOCKS = 60
LONGEST_BLOCKS = 40


class MixedLab(Lab):
    """A lab whose clients may have other policies, and quotas of up to `LARGEST` blocks."""

    def offers(self, policy: str) -> list[Offer]:
        everything = replace(self.quota, blocks=LONGEST_BLOCKS, compresses=False)
        found = []
        for name in (policy, *[other for other in OTHERS if other != policy]):
            made = make_policy(name, self.options, self.quota.page_tokens)
            quota = self.quota if made.compresses else everything
            largest = replace(quota, blocks=LARGEST) if made.compresses else everything
            found.append(Offer(made, Terms(policy=name, quota=quota), largest))
        return found

    def random_terms(self, prompt_tokens: int) -> Terms:
        chance = self.random
        terms = chance.choice(self.cache.slots.rules.offers).terms
        if not terms.quota.compresses:
            return terms
        quota = replace(terms.quota, blocks=chance.randint(terms.quota.min_blocks, LARGEST))
        most_tokens = min(prompt_tokens, (quota.blocks - quota.min_blocks) * quota.page_tokens)
        if most_tokens < 2 or chance.random() < 0.5:
            return replace(terms, quota=quota)
        length = chance.randint(1, most_tokens)
        start = chance.randint(0, prompt_tokens - length)
        pinned = Pinned(((start, start + length),))
        return replace(terms, quota=replace(quota, pinned_tokens=length), pinned=pinned)

    def terms_of(self, client: Client) -> Terms:
        if client.terms is None:
            client.terms = self.random_terms(client.prompt_tokens)
        return client.terms

    def check_content(self, client: Client, layer: int) -> None:
        super().check_content(client, layer)
        terms, state = self.terms_of(client), self.state(client)
        seen_tokens = self.cache.plans[client.request_id].stop_tokens
        for head in range(self.heads):
            held = set(self.held(client, layer, head).tolist())
            for start, stop in terms.pinned.ranges:
                assert held.issuperset(range(start, min(stop, seen_tokens)))
        assert len(state.blocks) <= terms.quota.blocks


def make_lab(seed: int) -> MixedLab:
    return MixedLab("hybrid", Quota(**QUOTA), pool_blocks=POOL_BLOCKS, seed=seed)


@pytest.mark.parametrize("block", range(4))
def test_random_terms_side_by_side(block: int) -> None:
    asked: set[str] = set()
    for seed in range(block * 15, (block + 1) * 15):
        lab = make_lab(seed)
        play(lab, num_steps=40)
        assert_empty(lab)
        asked |= {record.policy for record in lab.finished}
    assert asked == {"hybrid", *OTHERS}


def long_client(lab: Lab, name: str, terms: Terms) -> Client:
    return Client(name, 158, [Feature(4, 144, 4)], terms=terms)


def serve(lab: Lab, clients: list[Client], num_outputs: int = 20) -> None:
    while any(client.output_tokens < num_outputs for client in clients):
        lab.step({client: min(24, lab.room(client)) for client in clients})


@pytest.mark.parametrize("policy", ["hybrid", "window", "pyramidkv", "snapkv", "keydiff"])
def test_pinned_tokens_stay_in_every_head(policy: str) -> None:
    """To the last decoded token, where without a pin no head keeps all of them."""
    lab = MixedLab(policy, Quota(**QUOTA), pool_blocks=POOL_BLOCKS)
    plain = lab.cache.slots.rules.offers[0].terms
    pinned = Pinned(((40, 52), (70, 72)))
    quota = replace(plain.quota, pinned_tokens=pinned.num_tokens)
    asking = long_client(lab, "pins", replace(plain, quota=quota, pinned=pinned))
    other = long_client(lab, "plain", plain)
    serve(lab, [asking, other])
    wanted = {*range(40, 52), 70, 71}
    heads = [(layer, head) for layer in range(lab.layers) for head in range(lab.heads)]
    assert all(wanted <= set(lab.held(asking, *place).tolist()) for place in heads)
    assert not all(wanted <= set(lab.held(other, *place).tolist()) for place in heads)


def test_a_record_says_what_the_request_had() -> None:
    lab = make_lab(0)
    by_policy = {offer.terms.policy: offer.terms for offer in lab.cache.slots.rules.offers}
    small = replace(by_policy["window"].quota, blocks=by_policy["window"].quota.min_blocks)
    clients = [
        long_client(lab, "full", by_policy["full"]),
        long_client(lab, "less", replace(by_policy["window"], quota=small)),
        long_client(lab, "plain", by_policy["hybrid"]),
    ]
    serve(lab, clients, num_outputs=3)
    lab.step({}, finished=tuple(client.request_id for client in clients))
    full, less, plain = sorted(lab.finished, key=lambda record: record.request_id)
    assert (full.policy, less.policy, plain.policy) == ("full", "window", "hybrid")
    assert less.quota_blocks == less.peak_blocks == small.blocks
    assert plain.peak_blocks == QUOTA["blocks"]
    assert full.peak_blocks == full.full_cache_blocks and not full.compressions


@pytest.mark.parametrize(("policy", "is_turned"), [("snapkv", False), ("hybrid", True)])
def test_only_queries_that_may_run_ahead_are_turned(policy: str, is_turned: bool) -> None:
    """The others were asked where they stand, whatever another policy of the server needs."""
    lab = make_lab(0)
    terms = {offer.terms.policy: offer.terms for offer in lab.cache.slots.rules.offers}
    client = long_client(lab, "r", terms[policy])
    serve(lab, [client], num_outputs=2)
    state = lab.state(client)
    (asked,) = lab.cache.layers.probes.of(state, [0], state.computed_tokens + 50)
    assert state.bank is not None and state.position_offset is not None and asked is not None
    stored = state.bank.probe(0, state.position_offset + state.computed_tokens + 50, None)
    assert torch.equal(asked, stored) is not is_turned


@pytest.mark.parametrize("policy", ["window", "snapkv", "keydiff", "pyramidkv", "streammem"])
def test_a_policy_keeps_what_it_keeps_on_a_server_of_its_own(policy: str) -> None:
    lab, alone = make_lab(0), Lab(policy, Quota(**QUOTA), pool_blocks=POOL_BLOCKS, seed=0)
    terms = {offer.terms.policy: offer.terms for offer in lab.cache.slots.rules.offers}
    clients = [long_client(lab, "r", terms[policy]), Client("r", 158, [Feature(4, 144, 4)])]
    for its_lab, client in zip((lab, alone), clients, strict=True):
        serve(its_lab, [client])
    for layer in range(lab.layers):
        for head in range(lab.heads):
            held = [
                its_lab.held(client, layer, head)
                for its_lab, client in zip((lab, alone), clients, strict=True)
            ]
            assert torch.equal(*held)
