"""What the report of a request says of host memory, and what is told of all that left."""

from __future__ import annotations

from dataclasses import asdict

from tests.cache.client import Client
from tests.cache.test_recall import recalling_heads, run, small_lab


def test_without_room_a_request_is_served_as_before_and_its_report_says_so() -> None:
    lab = small_lab(tier_blocks=40)
    first = run(lab, Client("first", 300), outputs=2)
    second = run(lab, Client("second", 300), outputs=2)
    third = run(lab, Client("third", 20), outputs=2)
    assert lab.state(first).recalls
    assert not lab.state(second).in_tier
    assert recalling_heads(lab, second) == []
    budget_tokens = lab.quota.budget_tokens
    lens = lab.cache.tables.lens[lab.state(second).slot].float().mean()
    assert lens > budget_tokens - lab.quota.page_tokens
    lab.step({}, finished=tuple(c.request_id for c in (first, second, third)))
    records = {record.request_id: record for record in lab.finished}
    assert [records[name].recall for name in ("first", "second", "third")] == [
        "on",
        "no room",
        "not needed",
    ]
    record = records["first"]
    assert record.host_bytes == 38 * lab.recaller.tier.block_bytes
    assert record.recall_steps == 2
    assert 0 < record.moved_tokens <= record.recalled_tokens
    assert record.moved_bytes == record.moved_tokens * 2 * 32 * 4
    assert records["second"].host_bytes == records["second"].moved_tokens == 0
    counted = lab.cache.reports.take()
    assert counted is not None and counted.recalled is not None
    assert asdict(counted.recalled) == {
        "steps": record.recall_steps,
        "tokens": record.recalled_tokens,
        "moved_tokens": record.moved_tokens,
        "moved_bytes": record.moved_bytes,
    }
    assert lab.cache.reports.take() is None


def test_a_preempted_request_gives_up_its_host_memory_and_takes_it_again() -> None:
    lab = small_lab(tier_blocks=40)
    client = run(lab, Client("long", 300), outputs=3)
    lab.give_blocks(client)
    lab.step({}, preempted=(client.request_id,))
    assert lab.prompts.blocks.num_unheld == 40
    lab.step({client: lab.room(client)})
    assert lab.prompts.blocks.num_unheld == 2
    run(lab, client, outputs=6)
    assert lab.state(client).recalls
    lab.step({}, finished=(client.request_id,))
    (record,) = lab.finished
    # three tokens were computed before, and the two of them that had been output once more
    assert record.recall_steps == 3 + 6
