"""What is counted of a prompt that has been read: it is what the tables hold, and nothing waits."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_scenarios import QUOTA
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.summary import Summary

if TYPE_CHECKING:
    from vllm_budgetkv.policy import Observation, Retention

PROMPT_TOKENS = 158


class WatchedLab(Lab):
    """Knows by itself what share of the probe's attention each compression keeps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Observation] = []
        self.shares: dict[int, list[float]] = defaultdict(list)
        retain = self.policy.retain

        def see(observation: Observation) -> Retention:
            self.seen.append(observation)
            return retain(observation)

        self.policy.retain = see  # type: ignore[method-assign]

    def summarizes(self) -> bool:
        return True

    def check_content(self, client: Client, layer: int) -> None:
        super().check_content(client, layer)
        if not self.seen:
            return
        (seen,) = self.seen
        self.seen.clear()
        if seen.mass is None:
            return
        kept = 0.0
        for head in range(self.heads):
            stayed = torch.isin(seen.positions[head].long(), self.held(client, layer, head))
            kept += float((seen.mass[head] * stayed).sum())
        self.shares[layer].append(kept / float(seen.mass.sum()))


def run(policy: str, prompt_tokens: int = PROMPT_TOKENS) -> tuple[WatchedLab, Summary]:
    lab = WatchedLab(policy, Quota(**QUOTA), pool_blocks=30)
    client = Client("r", prompt_tokens, [Feature(4, prompt_tokens - 14, 4)])
    while client.computed_tokens < prompt_tokens:
        lab.step({client: min(24, prompt_tokens - client.computed_tokens)})
    counted = lab.cache.reports.take()
    assert counted is not None and list(counted.summaries) == ["r"] and counted.recalled is None
    assert lab.cache.reports.take() is None
    lab.step({}, finished=("r",))
    return lab, counted.summaries["r"]


@pytest.mark.parametrize("policy", ["hybrid", "window", "ada-snapkv", "keydiff"])
def test_it_counts_what_the_record_counts(policy: str) -> None:
    """The record, which reads every head in turn, is the reference."""
    lab, summary = run(policy)
    (record,) = lab.finished
    fields = summary.as_fields()
    assert fields["prompt_compressions"] == record.compressions > 3
    num_heads = lab.layers * lab.heads
    assert fields["dynamic_share"] == round(record.heads["dynamic"] / num_heads, 4)
    for name, count in record.heads.items():
        kept = {key: round(tokens / max(1, count), 1) for key, tokens in record.kept[name].items()}
        assert fields["kept_tokens_per_head"].get(name) == (kept if count else None)
    assert fields["heads"] == record.heads
    kept = {name: sum(record.kept[name].values()) for name in record.heads}
    assert summary.evicted_tokens == {
        name: count * PROMPT_TOKENS - kept[name] for name, count in record.heads.items()
    }
    assert fields["compression_ms"] > 0
    assert (fields["recall"], fields["reused_tokens"]) == ("off", 0)


@pytest.mark.parametrize("policy", ["hybrid", "snapkv", "ada-snapkv"])
def test_retained_mass_is_the_product_over_the_compressions(policy: str) -> None:
    lab, summary = run(policy)
    assert summary.retained_mass is not None
    expected = torch.tensor([torch.tensor(lab.shares[layer]).prod() for layer in range(lab.layers)])
    assert len(lab.shares[0]) > 3
    torch.testing.assert_close(summary.retained_mass, expected, rtol=1e-4, atol=1e-5)
    assert 0 < summary.as_fields()["retained_mass"] < 1


def test_a_policy_without_probe_has_none() -> None:
    assert run("window")[1].as_fields()["retained_mass"] is None


def test_a_prompt_that_fits_needs_no_count() -> None:
    lab = WatchedLab("hybrid", Quota(**QUOTA), pool_blocks=30)
    lab.step({Client("r", 20): 20})
    assert lab.cache.reports.take() is None


def test_nothing_is_counted_where_nobody_asks() -> None:
    lab = Lab("hybrid", Quota(**QUOTA), pool_blocks=30)
    client = Client("r", PROMPT_TOKENS)
    while client.computed_tokens < PROMPT_TOKENS:
        lab.step({client: min(24, PROMPT_TOKENS - client.computed_tokens)})
    assert lab.state(client).retained_mass is None
    assert lab.cache.reports.take() is None


def test_what_cannot_be_counted_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = WatchedLab("hybrid", Quota(**QUOTA), pool_blocks=30)
    reports = lab.cache.reports

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("vllm_budgetkv.cache.summary.Summary.of", fail)
    client = Client("r", PROMPT_TOKENS, [Feature(4, 144, 4)])
    while client.computed_tokens < PROMPT_TOKENS:
        lab.step({client: min(24, PROMPT_TOKENS - client.computed_tokens)})
    assert reports.take() is None and client.output_tokens == 1


def test_what_stands_behind_a_heads_tokens_is_not_counted() -> None:
    """The rest of its last page may hold what another request left there."""
    lab = WatchedLab("ada-snapkv", Quota(**QUOTA), pool_blocks=30)
    client = Client("r", PROMPT_TOKENS, [Feature(4, PROMPT_TOKENS - 14, 4)])
    while client.computed_tokens < PROMPT_TOKENS:
        lab.step({client: min(24, PROMPT_TOKENS - client.computed_tokens)})
    state, tables = lab.state(client), lab.cache.tables
    before = Summary.of(state, tables)
    page_tokens = lab.quota.page_tokens
    heads = [(layer, head) for layer in range(lab.layers) for head in range(lab.heads)]
    behind = 0
    for place in heads:
        page, offset = divmod(int(tables.lens[state.slot][place]), page_tokens)
        if offset:
            last = int(tables.page_table[state.slot][place][page])
            tables.pool.positions[last, offset:] = 10
            behind += page_tokens - offset
    assert behind, "some head must end inside a page"
    assert torch.equal(Summary.of(state, tables).kept_tokens, before.kept_tokens)
