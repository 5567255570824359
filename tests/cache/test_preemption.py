"""A request that is preempted and computed again holds, and answers, what it would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client
from tests.cache.scripted import BLOCKS, Haystack, options, small_quota, video_client

POLICIES = ["window", "snapkv", "pyramidkv", "lookm", "hybrid"]
OUTPUTS = 44


class Twin(Haystack):
    """Notes what each layer made of every token, by its position, the last time that it ran."""

    def __init__(self, policy: str, **changes: Any) -> None:
        quota = small_quota(retrieves=policy == "hybrid", **changes)
        super().__init__(
            policy, quota, pool_blocks=BLOCKS, needle=31, asking=[*range(70, 80)], options=options()
        )
        self.made: dict[tuple[int, int], torch.Tensor] = {}

    def see(self, client: Client, layer: int, out: torch.Tensor) -> None:
        for row, made in enumerate(out):
            self.made[layer, client.computed_tokens + row] = made.clone()

    def preempt(self, client: Client) -> None:
        self.give_blocks(client)
        # it gets other blocks
        self.free_blocks.reverse()
        self.step({}, preempted=(client.request_id,))

    def held_positions(self, client: Client) -> list[list[int]]:
        return [
            self.held(client, layer, head).tolist()
            for layer in range(self.layers)
            for head in range(self.heads)
        ]


def compare(lab: Twin, twin: Twin, client: Client, other: Client, prompt_tokens: int) -> None:
    assert lab.held_positions(client) == twin.held_positions(other)
    for layer, position in twin.made:
        if position >= prompt_tokens:
            made, expected = lab.made[layer, position], twin.made[layer, position]
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "prompt_tokens", [80, 90, 96, 97, 480], ids=["outgrows", "near", "fills", "one-more", "long"]
)
def test_a_preempted_request_equals_its_twin(policy: str, prompt_tokens: int) -> None:
    """Its output was prefilled as if it were prompt, and compressed at other points."""
    twin = Twin(policy)
    other = twin.run(video_client(prompt_tokens=prompt_tokens), outputs=OUTPUTS)
    for outputs in (10, 33):
        lab = Twin(policy)
        client = lab.run(video_client(prompt_tokens=prompt_tokens), outputs=outputs)
        lab.preempt(client)
        lab.run(client, outputs=OUTPUTS)
        compare(lab, twin, client, other, prompt_tokens)


@pytest.mark.parametrize("policy", ["window", "snapkv", "hybrid"])
def test_preempted_again_and_again_and_cut_anywhere(policy: str) -> None:
    """Twice, in the middle of what is computed again; and chunks of output of any size."""
    twin, lab = Twin(policy), Twin(policy)
    other = twin.run(video_client(prompt_tokens=200), outputs=OUTPUTS)
    client = lab.run(video_client(prompt_tokens=200), outputs=30)
    for _ in range(2):
        lab.preempt(client)
        while client.computed_tokens < 215:
            room, is_output = lab.room(client), client.computed_tokens >= 200
            lab.step({client: lab.random.randint(1, room) if is_output else room})
    lab.run(client, outputs=OUTPUTS)
    compare(lab, twin, client, other, 200)


def test_a_preempted_request_keeps_its_look_ahead() -> None:
    labs = []
    for preempts in (False, True):
        lab = Twin("hybrid")
        client = video_client()
        lab.look_ahead(client, Client(client.request_id + LOOKAHEAD, 0))
        if preempts:
            lab.run(client, outputs=20)
            lab.preempt(client)
        labs.append((lab, lab.run(client, outputs=OUTPUTS)))
    (twin, other), (lab, client) = labs
    compare(lab, twin, client, other, client.prompt_tokens)


@pytest.mark.parametrize("policy", ["hybrid", "snapkv", "streammem"])
@pytest.mark.parametrize("prompt_tokens", [88, 93, 96])
def test_how_a_prompt_that_fits_was_cut_does_not_show(policy: str, prompt_tokens: int) -> None:
    """Its chunks depend on the load; the queries that later score the cache must not. A prompt that
    ends with its video leaves few of them in its last chunk, which were all that it got."""
    seen = []
    for size in (96, 40, 1):
        lab = Twin(policy, chunk_tokens=96)
        client = video_client(prompt_tokens=prompt_tokens, text_tokens=2)
        while client.computed_tokens < prompt_tokens:
            lab.step({client: min(size, lab.room(client))})
        lab.run(client, outputs=lab.quota.tokens + 1 - prompt_tokens)
        bank = lab.cache.slots.requests["video"].bank
        assert bank is not None
        queries = sorted(bank.positions.tolist())
        lab.run(client, outputs=OUTPUTS)
        seen.append((queries, lab.held_positions(client)))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("prompt_tokens", [90, 200])
def test_the_report_says_what_was_kept_behind_the_prompt(prompt_tokens: int) -> None:
    lab = Twin("window")
    client = lab.run(video_client(prompt_tokens=prompt_tokens), outputs=30)
    record = lab.cache.reports.records["video"]
    kept = dict(record.kept_counts)
    lab.preempt(client)
    lab.run(client, outputs=31)
    assert lab.cache.reports.records["video"].kept_counts == kept
    assert record.preemptions == 1 and len(kept["static"]) == prompt_tokens
