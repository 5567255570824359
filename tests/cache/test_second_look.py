"""What stays of a prompt is chosen anew by its question where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client
from tests.cache.test_recall import RECALL, RecallLab, make_lab, run, small_lab
from tests.cache.test_scenarios import assert_empty, play
from vllm_budgetkv.policy import PolicyOptions

SCENARIOS = 20
NEEDLE = 40


class Looking(RecallLab):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = {"sink_tokens": 2, "window_tokens": 8, "probe_tokens": 4}
        super().__init__(*args, options=PolicyOptions(**known, second_look=True), **kwargs)


@pytest.mark.parametrize("block", range(2))
def test_random_scenarios(block: int) -> None:
    """The lab compares every held token with its content; ledger and poison are on."""
    count, checked = SCENARIOS // 2, 0
    for seed in range(block * count, (block + 1) * count):
        lab = make_lab(seed, Looking)
        play(lab, num_steps=45)
        assert_empty(lab)
        checked += lab.num_checked
    assert checked > count


def needle_lab(*, second_look: bool, kind: type[RecallLab] = RecallLab) -> RecallLab:
    """The question looks at one early token; what ran ahead of it at nothing there is."""
    known = {"probe_tokens": 4, "unlike_share": 0.0, "reach_tokens": 0}
    lab = small_lab(kind=kind, options=PolicyOptions(**known, second_look=second_look))
    projected = lab.project
    needle = torch.full((1, lab.heads, lab.head_size), 2.0)

    def project(client: Client, layer: int, first: int, count: int) -> Any:
        query, key, value = (part.clone() for part in projected(client, layer, first, count))
        if client.request_id.endswith(LOOKAHEAD):
            return -needle.repeat(count, lab.group, 1), key, value
        for position in range(first, first + count):
            if position == NEEDLE:
                key[position - first] = needle
            if position >= client.prompt_tokens - 4:
                query[position - first] = needle.repeat(1, lab.group, 1)
        return query, key, value

    lab.project = project  # type: ignore[method-assign]
    lab.rotaries = dict  # type: ignore[method-assign]
    lab.cache = lab.make_cache("hybrid", 6)
    return lab


@pytest.mark.parametrize("second_look", [False, True])
def test_the_question_finds_what_the_look_ahead_missed(*, second_look: bool) -> None:
    lab = needle_lab(second_look=second_look)
    client = Client("long", 300)
    ahead = Client(client.request_id + LOOKAHEAD, 5)
    lab.step({ahead: 5})
    lab.give_blocks(ahead)
    lab.step({}, finished=(ahead.request_id,))
    while client.computed_tokens < lab.quota.chunks_end(300):
        lab.step({client: lab.room(client)})
    state = lab.state(client)
    kept = [
        NEEDLE in lab.held(client, layer, head).tolist()[int(recalled) :]
        for layer, heads in enumerate(lab.recaller.num_recalled[state.slot])
        for head, recalled in enumerate(heads)
    ]
    assert all(kept) if second_look else not any(kept)


def test_it_keeps_no_more_and_recalls_as_much() -> None:
    once, twice = small_lab(), small_lab(options=PolicyOptions(probe_tokens=4, second_look=True))
    sizes = []
    for lab in (once, twice):
        client = run(lab, Client("long", 300), outputs=3)
        state = lab.state(client)
        room = lab.quota.recall_room(300)
        assert room is not None and state.recalls
        recalled = lab.recaller.num_recalled[state.slot]
        held = lab.cache.tables.lens[state.slot] - recalled
        assert int(held.sum()) <= 6 * (room.resident_tokens + 3)
        sizes.append((int((recalled > 0).sum()), int(recalled.sum())))
    assert sizes[0] == sizes[1] and sizes[0][0] == RECALL.num_heads
