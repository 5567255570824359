"""The story of a request: each number is what the tables and the ledger say behind that step."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_scenarios import QUOTA
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache import notices
from vllm_budgetkv.cache.ledger import held_pages
from vllm_budgetkv.cache.trace import (
    MOST_STEPS,
    Trace,
    kept_positions,
    packed_bits,
    unpacked_bits,
)

if TYPE_CHECKING:
    from pathlib import Path

PROMPT_TOKENS = 158
FILE = "trace.jsonl"


class TracingLab(Lab):
    """Writes the stories of its clients to a file, and knows them by itself."""

    def __init__(self, folder: Path, policy: str = "hybrid") -> None:
        self.folder = folder
        self.steps: list[list[int]] = []
        self.classes: list[list[Any]] = []
        super().__init__(policy, Quota(**QUOTA), pool_blocks=30)

    def trace_file(self) -> Path:
        return self.folder / FILE

    def see_step(self, client: Client) -> None:
        state, tables = self.state(client), self.cache.tables
        pages = held_pages(tables, state.slot).numel()
        self.steps.append([client.computed_tokens, len(client.blocks), pages])
        if state.compressions != (self.classes[-1][1] if self.classes else 0):
            flags = "".join(map(str, tables.is_static[state.slot].flatten().int().tolist()))
            self.classes.append([client.computed_tokens, state.compressions, flags])

    def read_prompt(self, client: Client) -> None:
        while client.computed_tokens < client.prompt_tokens:
            self.step({client: min(24, client.prompt_tokens - client.computed_tokens)})
            self.see_step(client)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.trace_file().read_text().splitlines()]


def new_client() -> Client:
    return Client("r", PROMPT_TOKENS, [Feature(4, PROMPT_TOKENS - 14, 4)])


def test_every_step_is_what_the_ledger_counts(tmp_path: Path) -> None:
    lab, client = TracingLab(tmp_path), new_client()
    lab.read_prompt(client)
    kept = kept_positions(lab.state(client), lab.cache.tables)
    for layer in range(lab.layers):
        for head in range(lab.heads):
            positions = kept[layer, head].nonzero().flatten()
            assert positions.tolist() == sorted(lab.held(client, layer, head).tolist())
    lens = lab.cache.tables.lens[lab.state(client).slot].tolist()
    for _ in range(40):
        lab.step({client: 1})
        lab.see_step(client)
    lab.step({}, finished=("r",))
    (line,) = lab.lines()
    trace, (record,) = line["trace"], lab.finished
    assert line["record"] == json.loads(json.dumps(vars(record)))
    assert [step[1:] for step in trace["steps"][:-1]] == lab.steps
    assert trace["steps"][-1][1:] == [PROMPT_TOKENS + 40, 0, 0], "it gave up its slot"
    assert max(step[2] for step in trace["steps"]) == record.peak_blocks
    seconds = [step[0] for step in trace["steps"]]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert trace["classes"] == lab.classes and len(lab.classes) > 5
    shape = (lab.layers, lab.heads, PROMPT_TOKENS)
    assert trace["shape"] == list(shape[:2]) and trace["held_tokens"] == lens
    assert np.array_equal(unpacked_bits(trace["kept"], shape), kept.numpy())
    assert trace["prompt_token_ids"] == list(range(PROMPT_TOKENS))
    (item,) = trace["items"]
    assert item["ranges"] == [[4, PROMPT_TOKENS - 10]]
    assert item["runs"] == [[(PROMPT_TOKENS - 14) // 4, 1, 4]]


def test_what_stands_behind_a_heads_tokens_is_not_kept(tmp_path: Path) -> None:
    """The rest of its last page may hold what another request left there."""
    lab, client = TracingLab(tmp_path, "ada-snapkv"), new_client()
    lab.read_prompt(client)
    state, tables = lab.state(client), lab.cache.tables
    before = kept_positions(state, tables)
    page_tokens, behind = lab.quota.page_tokens, 0
    for layer, head in itertools.product(range(lab.layers), range(lab.heads)):
        page, offset = divmod(int(tables.lens[state.slot, layer, head]), page_tokens)
        if offset:
            dropped = int((~before[layer, head]).nonzero()[0])
            last = int(tables.page_table[state.slot, layer, head, page])
            tables.pool.positions[last, offset:] = dropped
            behind += page_tokens - offset
    assert behind, "some head must end inside a page"
    assert torch.equal(kept_positions(state, tables), before)


def test_kept_tokens_are_those_of_the_record(tmp_path: Path) -> None:
    """The record sums over the heads of a class what the trace says of each."""
    lab, client = TracingLab(tmp_path), new_client()
    lab.read_prompt(client)
    lab.step({}, finished=("r",))
    (line,) = lab.lines()
    kept = unpacked_bits(line["trace"]["kept"], (lab.layers, lab.heads, PROMPT_TOKENS))
    is_static = np.array(line["record"]["static_heads"])
    for name, chosen in (("static", is_static), ("dynamic", ~is_static)):
        assert kept[chosen].sum(0).tolist() == line["record"]["kept_counts"][name]


def test_a_preempted_request_begins_anew(tmp_path: Path) -> None:
    lab, client = TracingLab(tmp_path), new_client()
    for _ in range(5):
        lab.step({client: 24})
    assert lab.state(client).compressions == 2
    lab.give_blocks(client)
    lab.step({}, preempted=("r",))
    lab.read_prompt(client)
    lab.step({}, finished=("r",))
    trace = lab.lines()[0]["trace"]
    seen = [step[1] for step in trace["steps"]]
    before = [24, 48, 72, 96, 120, 120]
    assert seen == [*before, *(step[0] for step in lab.steps), PROMPT_TOKENS]
    assert [step[2] for step in trace["steps"]].count(0) == 2
    assert trace["classes"][-len(lab.classes) :] == lab.classes
    assert len(trace["classes"]) > len(lab.classes)


@pytest.mark.parametrize("peak", [0, 1, 2, MOST_STEPS + 7, 3 * MOST_STEPS + 5, 5 * MOST_STEPS - 2])
def test_many_steps_share_entries_and_none_hides_the_most(peak: int) -> None:
    trace = Trace((1, 2), 4, None, [])
    for step in range(5 * MOST_STEPS):
        trace.step(step, 9 if step == peak else 3, 99 if step == peak + 1 else 3)
        trace.compressed(step, step + 1, [[True, step % 2 == 0]])
    assert len(trace.steps) <= MOST_STEPS and trace.step_stride == 8
    assert max(step[2] for step in trace.steps) == 9
    assert max(step[3] for step in trace.steps) == 99
    assert len(trace.classes) <= MOST_STEPS
    last = 5 * MOST_STEPS - 1
    assert trace.steps[-1][1] == last
    assert trace.as_fields()["classes"][-1] == [last, last + 1, "10"]


def test_a_prompt_with_too_many_bits_is_told_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_budgetkv.cache.trace.MOST_KEPT_BITS", 100)
    lab, client = TracingLab(tmp_path), new_client()
    lab.read_prompt(client)
    lab.step({}, finished=("r",))
    trace = lab.lines()[0]["trace"]
    assert trace["kept"] is None and trace["held_tokens"]


@pytest.mark.parametrize("broken", ["file", "tables", "features"])
def test_what_cannot_be_traced_ends_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", lambda text, *args: said.append(text % args))
    notices.warn_once.cache_clear()

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    lab, client = TracingLab(tmp_path / "missing" if broken == "file" else tmp_path), new_client()
    if broken == "tables":
        monkeypatch.setattr("vllm_budgetkv.cache.trace.kept_positions", fail)
    if broken == "features":
        monkeypatch.setattr("vllm_budgetkv.cache.trace.item_records", fail)
    lab.read_prompt(client)
    lab.step({}, finished=("r",))
    assert len(lab.finished) == 1 and client.output_tokens == 1
    (line,) = said
    assert "--kv-trace-file" in line and "said once" in line


def test_nothing_is_traced_where_nobody_asks() -> None:
    lab = Lab("hybrid", Quota(**QUOTA), pool_blocks=30)
    assert lab.cache.reports.traces is None


@pytest.mark.parametrize("packed", ["eJwDAAAAAAE=", "AAAA"])
def test_bits_that_are_none_are_refused(packed: str) -> None:
    with pytest.raises(ValueError, match="bytes are not the|cannot be read"):
        unpacked_bits(packed, (3, 5))


def test_bits_come_back() -> None:
    flags = np.random.default_rng(0).random((3, 5, 7)) < 0.5
    assert np.array_equal(unpacked_bits(packed_bits(flags), flags.shape), flags)
