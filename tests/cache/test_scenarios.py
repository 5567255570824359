"""The ledger under random chunks, aborts, preemptions and long outputs, without a model.

After every layer each held token must be, bit by bit, the one written at its position; free pages
are NaN; and the ledger is checked after every step.
"""

from __future__ import annotations

import random
from typing import TypeVar

import pytest

from tests.cache.client import LOOKAHEAD, Client, Feature
from tests.cache.lab import Lab
from vllm_budgetkv.arithmetic.quota import Quota

SCENARIOS = 200
POOL_BLOCKS = 40
BASELINES = ["random", "snapkv", "ada-snapkv", "pyramidkv", "sparsemm", "keydiff"]
BASELINES += ["infinipot-v", "cords", "streammem", "lookm"]
AnyLab = TypeVar("AnyLab", bound=Lab)


def make_lab(seed: int, policy: str, kind: type[AnyLab] = Lab) -> AnyLab:
    chance = random.Random(seed)
    numbers = {
        "page_tokens": chance.choice([8, 16]),
        "num_layers": chance.choice([1, 2, 3]),
        "chunk_tokens": chance.randint(1, 40),
        "decode_interval_tokens": chance.randint(1, 12),
    }
    # for some seeds, a block is many pages of each head
    numbers["block_pages"] = 5 if seed % 4 == 3 else 1
    smallest = Quota(blocks=10**6, **numbers).min_blocks
    quota = Quota(blocks=smallest + chance.randint(0, 3), **numbers)
    return kind(
        policy,
        quota,
        pool_blocks=max(POOL_BLOCKS, 2 * quota.blocks),
        heads=chance.choice([1, 2, 3]),
        group=chance.choice([1, 2]),
        seed=seed,
    )


def make_client(lab: Lab, name: str) -> Client:
    chance = lab.random
    prompt_tokens = chance.choice(
        [1, lab.quota.tokens, lab.quota.tokens + 1, chance.randint(2, 200)]
    )
    features = []
    if prompt_tokens > 30:
        frame_tokens = chance.choice([4, 12])
        frames = chance.randint(1, (prompt_tokens - 10) // frame_tokens)
        features.append(Feature(chance.randint(0, 5), frames * frame_tokens, frame_tokens))
    return Client(name, prompt_tokens, features)


def play(lab: Lab, num_steps: int) -> None:
    """Admit, run, preempt and abort clients at random; a look-ahead runs before some of them."""
    chance, clients, finished = lab.random, [], []
    for number in range(num_steps):
        if len(clients) < 4 and chance.random() < 0.5:
            client = make_client(lab, f"request{number}")
            long = lab.quota_of(client).compresses_prompt(client.prompt_tokens)
            policy = lab.policy_of(client)
            looks_ahead = policy.needs_scores and policy.probe_source.runs_ahead
            if long and looks_ahead and chance.random() < 0.5:
                ahead = Client(client.request_id + LOOKAHEAD, min(5, lab.quota.chunk_tokens))
                ahead.terms = client.terms
                lab.step({ahead: ahead.prompt_tokens})
                lab.give_blocks(ahead)
                finished.append(ahead.request_id)
            clients.append(client)
        preempted = []
        for client in list(clients):
            if client.blocks and chance.random() < 0.06:
                lab.give_blocks(client)
                if chance.random() < 0.5:
                    preempted.append(client.request_id)
                else:
                    clients.remove(client)
                    finished.append(client.request_id)
        work = {}
        for client in clients:
            num_tokens = chance.randint(1, lab.room(client))
            needed = lab.blocks_needed(client, client.computed_tokens + num_tokens)
            promised = sum(
                lab.blocks_needed(c, c.computed_tokens + t) - len(c.blocks) for c, t in work.items()
            )
            fits = needed - len(client.blocks) + promised <= len(lab.free_blocks)
            if fits and chance.random() < 0.8:
                work[client] = num_tokens
        lab.step(work, finished=tuple(finished), preempted=tuple(preempted))
        finished = []
    lab.step({}, finished=(*finished, *(client.request_id for client in clients)))


@pytest.mark.parametrize("policy", ["hybrid", "window"])
@pytest.mark.parametrize("block", range(4))
def test_random_scenarios(policy: str, block: int) -> None:
    count = SCENARIOS // 8
    play_scenarios(policy, range(block * count, (block + 1) * count))


@pytest.mark.parametrize("policy", BASELINES)
def test_random_scenarios_of_the_baselines(policy: str) -> None:
    play_scenarios(policy, range(SCENARIOS // 8))


def play_scenarios(policy: str, seeds: range) -> None:
    for seed in seeds:
        lab = make_lab(seed, policy)
        play(lab, num_steps=30)
        assert_empty(lab)


def assert_empty(lab: Lab) -> None:
    """Nothing of any request is left."""
    slots, seeds = lab.cache.slots, lab.cache.layers.probes.seeds
    assert not (slots.requests or slots.spans or slots.arrivals) and not lab.cache.reports.records
    assert all(name + LOOKAHEAD not in seeds for name in lab.gone)
    tables = lab.cache.tables
    assert (tables.page_table == -1).all() and (tables.lens == 0).all()
    assert (
        (tables.num_free == 0).all() and tables.is_static.all() and not tables.is_retrieving.any()
    )
    for record in lab.finished:
        assert record.peak_blocks <= record.quota_blocks


def test_full_policy_is_ordinary_paging() -> None:
    quota = Quota(
        blocks=30,
        page_tokens=8,
        num_layers=2,
        chunk_tokens=64,
        decode_interval_tokens=8,
        compresses=False,
    )
    lab = Lab("full", quota, pool_blocks=64)
    client = Client("long", 200)
    while client.output_tokens < 10:
        lab.step({client: min(37, client.total_tokens - client.computed_tokens)})
    assert [len(lab.held(client, 0, head)) for head in range(2)] == [209, 209]


def long_run(lab: Lab, chunk_tokens: int, outputs: int = 30) -> Client:
    vision = Feature(10, lab.quota.tokens * 4, 4)
    client = Client("long", vision.length + 30, [vision])
    while client.output_tokens < outputs:
        lab.step({client: min(chunk_tokens, client.total_tokens - client.computed_tokens)})
    return client


QUOTA = {
    "blocks": 12,
    "page_tokens": 8,
    "num_layers": 3,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
}


@pytest.mark.parametrize("policy", ["hybrid", "window", *BASELINES])
def test_long_prompt_and_output_stay_inside_the_quota(policy: str) -> None:
    lab = Lab(policy, Quota(**QUOTA), pool_blocks=12)
    client = long_run(lab, 24)
    assert client.blocks and len(client.blocks) == 12
    tables = lab.cache.tables
    slot = lab.cache.slots.requests["long"].slot
    average = tables.lens[slot].float().mean().item()
    budget = lab.quota.budget_tokens
    assert budget * 0.8 < average <= budget + lab.quota.decode_interval_tokens
    for layer in range(3):
        positions = lab.held(client, layer, 0)
        assert positions[0] == 0
        assert positions[-1] == client.computed_tokens - 1


def test_positions_are_the_original_ones_after_compaction() -> None:
    lab = Lab("hybrid", Quota(**QUOTA), pool_blocks=12)
    client = long_run(lab, 24, outputs=2)
    positions = lab.held(client, 1, 1)
    assert positions.max() > 5 * len(positions), "positions must not be renumbered"


def test_a_broken_ledger_is_found() -> None:
    lab = Lab("window", Quota(**QUOTA), pool_blocks=12)
    client = long_run(lab, 24, outputs=2)
    tables, slot = lab.cache.tables, lab.cache.slots.requests["long"].slot
    page = int(tables.page_table[slot, 0, 0, 0])
    with pytest.raises(RuntimeError, match="lost, foreign or held twice"):
        tables.page_table[slot, 1, 1, 0] = page
        lab.step({})
    assert client.blocks


def test_a_page_freed_twice_is_found() -> None:
    lab = Lab("window", Quota(**QUOTA), pool_blocks=12)
    long_run(lab, 24, outputs=2)
    tables, slot = lab.cache.tables, lab.cache.slots.requests["long"].slot
    top = int(tables.num_free[slot])
    tables.free_pages[slot, top] = tables.free_pages[slot, top - 1]
    tables.num_free[slot] += 1
    with pytest.raises(RuntimeError, match="lost, foreign or held twice"):
        lab.step({})


def test_more_blocks_than_the_quota_are_found() -> None:
    lab = Lab("window", Quota(**QUOTA), pool_blocks=20)
    long_run(lab, 24, outputs=2)
    lab.cache.slots.requests["long"].blocks.append(lab.free_blocks[0])
    with pytest.raises(RuntimeError, match="holds 13 blocks, its quota is 12"):
        lab.step({})
