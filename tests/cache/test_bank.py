"""The probe bank: what it holds, in which order, and at which position it asks."""

from __future__ import annotations

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client, Feature
from tests.cache.scripted import Scripted
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.probe.bank import BankShape, BankWrite, ProbeBank, Rotary
from vllm_budgetkv.cache.probe.rotation import rotate
from vllm_budgetkv.policy import PolicyOptions

LAYERS, CAPACITY, QUERY_HEADS, HEAD_SIZE = 2, 4, 3, 32
INV_FREQ = 100.0 ** -torch.linspace(0, 1, HEAD_SIZE // 2)


def make_bank() -> ProbeBank:
    shape = BankShape(LAYERS, QUERY_HEADS, HEAD_SIZE, torch.float32, torch.device("cpu"))
    return ProbeBank(shape, CAPACITY)


def numbered(first: int, count: int) -> torch.Tensor:
    """[count, Hq, D], every element the number of its token."""
    tokens = torch.arange(first, first + count, dtype=torch.float32)
    return tokens[:, None, None].expand(count, QUERY_HEADS, HEAD_SIZE).clone()


def write(bank: ProbeBank, first: int, count: int) -> BankWrite:
    """One step of text tokens `first`, ..., all at the position of their number."""
    plan = bank.plan_write(list(range(count)))
    bank.write_positions(plan, torch.arange(first, first + count))
    for layer in range(LAYERS):
        bank.write_queries(plan, layer, numbered(first, count) + 100 * layer)
    return plan


def content(bank: ProbeBank, layer: int = 0) -> list[int]:
    """Token numbers in the order in which the bank gives them."""
    return bank.probe(layer, torch.tensor(0), None)[:, 0, 0].int().tolist()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1], [0]),
        ([3], [0, 1, 2]),
        ([4], [0, 1, 2, 3]),
        ([5], [1, 2, 3, 4]),
        ([3, 1], [0, 1, 2, 3]),
        ([3, 3], [2, 3, 4, 5]),
        ([1] * 7, [3, 4, 5, 6]),
        ([9, 2], [7, 8, 9, 10]),
        ([2, 11, 1], [10, 11, 12, 13]),
        ([], []),
    ],
    ids=str,
)
def test_the_last_text_tokens_oldest_first(steps: list[int], expected: list[int]) -> None:
    bank = make_bank()
    first = 0
    for count in steps:
        write(bank, first, count)
        first += count
    assert bank.size == len(expected)
    assert content(bank) == expected
    assert content(bank, layer=1) == [100 + token for token in expected]


def test_only_the_planned_tokens_are_stored() -> None:
    bank = make_bank()
    plan = bank.plan_write([5, 2])
    bank.write_positions(plan, torch.arange(50, 60))
    bank.write_queries(plan, 0, numbered(0, 10))
    assert content(bank) == [5, 2]
    assert bank.positions[:2].tolist() == [55, 52]


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("rotary", [32, 16])
def test_a_probe_is_the_query_rotated_at_its_new_place(is_neox: bool, rotary: int) -> None:
    """Stored at its own position and turned on: equal to the raw query turned there directly."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(6, QUERY_HEADS, HEAD_SIZE, generator=generator)
    positions = torch.tensor([2, 3, 90, 91, 92, 300])
    inv_freq = INV_FREQ[: rotary // 2]
    bank = make_bank()
    plan = bank.plan_write(list(range(6)))
    bank.write_positions(plan, positions)
    bank.write_queries(plan, 1, rotate(raw, positions, inv_freq, is_neox))
    probe = bank.probe(1, torch.tensor(1000), Rotary(inv_freq, is_neox))
    expected = rotate(raw[-CAPACITY:], torch.arange(1000, 1000 + CAPACITY), inv_freq, is_neox)
    torch.testing.assert_close(probe, expected, rtol=0, atol=3e-4)
    wrong = rotate(raw[-CAPACITY:], torch.arange(1001, 1001 + CAPACITY), inv_freq, is_neox)
    assert (probe - wrong).abs().max() > 0.1


def test_a_probe_does_not_change_the_bank() -> None:
    bank = make_bank()
    write(bank, 7, 3)
    before = bank.queries.clone()
    bank.probe(0, torch.tensor(50), Rotary(INV_FREQ, True)).zero_()
    assert torch.equal(bank.queries, before)


def test_a_copy_is_independent() -> None:
    bank = make_bank()
    write(bank, 0, 3)
    clone = bank.copy()
    write(clone, 3, 2)
    assert (content(bank), content(clone)) == ([0, 1, 2], [1, 2, 3, 4])
    assert bank.positions[:3].tolist() == [0, 1, 2]
    write(bank, 10, 4)
    assert content(clone) == [1, 2, 3, 4]


def test_bytes_are_those_of_its_tensors() -> None:
    assert make_bank().nbytes == LAYERS * CAPACITY * QUERY_HEADS * HEAD_SIZE * 4 + CAPACITY * 8


# --- which tokens of a request enter ------------------------------------------------------------

TEXT_TOKENS, PROMPT_TOKENS = 6, 206
VISION_STOP = PROMPT_TOKENS - TEXT_TOKENS


def make_lab(policy: str = "hybrid") -> tuple[Scripted, Client]:
    quota = Quota(blocks=12, page_tokens=8, num_layers=3, chunk_tokens=24, decode_interval_tokens=8)
    options = PolicyOptions(sink_tokens=2, window_tokens=8, probe_tokens=8)
    lab = Scripted(policy, quota, pool_blocks=12, options=options)
    video = Feature(TEXT_TOKENS, VISION_STOP - TEXT_TOKENS, 4)
    return lab, Client("video", PROMPT_TOKENS, [video])


def run_ahead(lab: Scripted, client: Client, num_tokens: int = 12) -> None:
    ahead = Client(client.request_id + LOOKAHEAD, num_tokens)
    lab.step({ahead: num_tokens})
    lab.give_blocks(ahead)
    lab.step({}, finished=(ahead.request_id,))


def bank_positions(lab: Scripted, client: Client) -> list[int]:
    """Positions of the bank's queries, oldest first."""
    bank = lab.cache.slots.requests[client.request_id].bank
    assert bank is not None
    first = bank.num_written - bank.size
    return [int(bank.positions[(first + rank) % bank.capacity]) for rank in range(bank.size)]


def test_vision_tokens_never_enter() -> None:
    lab, client = make_lab()
    seen = []
    while client.output_tokens < 4:
        lab.step({client: min(24, client.total_tokens - client.computed_tokens)})
        seen.append(bank_positions(lab, client))
    head = list(range(TEXT_TOKENS))
    tail = list(range(VISION_STOP, PROMPT_TOKENS + 3))
    assert seen[0] == head == seen[-5]
    assert seen[-4] == [4, 5, *range(VISION_STOP, PROMPT_TOKENS)]
    assert seen[-1] == tail[-8:]


def test_a_stored_query_is_the_one_of_its_position() -> None:
    lab, client = make_lab()
    lab.run(client, outputs=4)
    bank = lab.cache.slots.requests["video"].bank
    assert bank is not None
    for layer in range(3):
        for place, position in enumerate(bank.positions.tolist()):
            query, _, _ = lab.project(client, layer, position, 1)
            assert torch.equal(bank.queries[layer, place], query[0])


def test_text_before_the_video_does_not_replace_a_seed() -> None:
    lab, client = make_lab()
    run_ahead(lab, client)
    seed = lab.cache.layers.probes.seeds["video"]
    stored = seed.queries.clone()
    # the last 8 of the look-ahead's 12 tokens
    assert sorted(seed.positions.tolist()) == list(range(4, 12))
    while client.computed_tokens < VISION_STOP - 24:
        lab.step({client: 24})
        assert bank_positions(lab, client) == list(range(4, 12))
    lab.run(client, outputs=1)
    assert bank_positions(lab, client) == [10, 11, *range(VISION_STOP, PROMPT_TOKENS)]
    assert torch.equal(seed.queries, stored), "a preempted request must find its seed again"


def test_a_text_prompt_replaces_its_seed_with_its_own_end() -> None:
    """What runs ahead is its end; until that is reached, no other text takes its place."""
    lab, _ = make_lab()
    client = Client("text", PROMPT_TOKENS)
    run_ahead(lab, client)
    while client.computed_tokens + 24 <= PROMPT_TOKENS - 8:
        lab.step({client: 24})
        assert bank_positions(lab, client) == list(range(4, 12))
    lab.run(client, outputs=1)
    assert bank_positions(lab, client) == list(range(PROMPT_TOKENS - 8, PROMPT_TOKENS))


def test_the_probe_asks_behind_the_last_token() -> None:
    lab, client = make_lab()
    while client.output_tokens < 4:
        lab.step({client: min(24, client.total_tokens - client.computed_tokens)})
        # in this lab a token's rotary position is its index
        assert lab.cache.slots.requests["video"].position_offset == 0


def test_a_seed_leaves_with_its_request() -> None:
    lab, client = make_lab()
    run_ahead(lab, client)
    lab.step({client: 24})
    lab.give_blocks(client)
    lab.step({}, finished=("video",))
    assert not lab.cache.layers.probes.seeds


@pytest.mark.parametrize("policy", ["hybrid", "window"])
def test_who_needs_a_bank(policy: str) -> None:
    """Long prompts and outputs near the quota under a policy that scores, nobody else."""
    lab, client = make_lab(policy)
    short = Client("short", lab.quota.tokens - 20)
    lab.run(short, outputs=1)
    state = lab.cache.slots.requests["short"]
    assert state.bank is None
    lab.run(short, outputs=15)
    assert (state.bank is not None) == (policy == "hybrid")
    lab.give_blocks(short)
    lab.step({client: 24}, finished=("short",))
    assert (lab.cache.slots.requests["video"].bank is not None) == (policy == "hybrid")
