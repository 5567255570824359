"""The rehearsal passes every kernel that a request can need, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_recall import RECALL, run, small_lab
from tests.cache.test_replay import look_ahead
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.rehearsal import rehearse
from vllm_budgetkv.policy import POLICIES, PolicyOptions

QUOTA = Quota(blocks=12, page_tokens=8, num_layers=3, chunk_tokens=24, decode_interval_tokens=16)
OPS = ("append", "attend", "score", "contrast", "select", "compact", "digest", "retrieve", "merge")
COMPRESSING = sorted(name for name, policy in POLICIES.items() if policy.compresses)
# the lab's shadow knows no merges
SHADOWED = [name for name in COMPRESSING if not name.startswith("lookm-")]


def make_lab(
    policy: str = "hybrid", pool_blocks: int = 40, kind: type[Lab] = Lab, **options: Any
) -> Lab:
    chosen = PolicyOptions(sink_tokens=2, window_tokens=8, probe_tokens=8, **options)
    return kind(policy, QUOTA, pool_blocks=pool_blocks, options=chosen)


def serve(lab: Lab) -> list[torch.Tensor]:
    """What attention gives a long video and 20 tokens of output."""
    client = Client("video", 206, [Feature(6, 192, 4)])
    seen: list[torch.Tensor] = []
    lab.see = lambda client, layer, out: seen.append(out.clone())  # type: ignore[method-assign]
    while client.output_tokens < 20:
        lab.step({client: min(24, client.total_tokens - client.computed_tokens)})
    return seen


@pytest.mark.parametrize("policy", COMPRESSING)
def test_the_cache_is_empty_again(policy: str) -> None:
    lab, untouched = make_lab(policy), make_lab(policy)
    rehearse(lab.cache)
    for name in ("page_table", "lens", "num_free", "is_retrieving", "is_static"):
        pair = (getattr(lab.cache.tables, name), getattr(untouched.cache.tables, name))
        assert torch.equal(*pair), name
    assert all(field.isnan().all() for field in (lab.pool.keys, lab.pool.values))
    slots, records = lab.cache.slots, lab.cache.reports.records
    assert not (slots.requests or slots.spans or slots.arrivals or lab.cache.layers.probes.seeds)
    assert not (records or lab.finished)
    assert lab.cache.step is None and not lab.cache.plans


@pytest.mark.parametrize("policy", SHADOWED)
def test_the_next_request_is_as_without(policy: str) -> None:
    lab, untouched = make_lab(policy), make_lab(policy)
    rehearse(lab.cache)
    for found, expected in zip(serve(lab), serve(untouched), strict=True):
        assert torch.equal(found, expected)


def test_it_reaches_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called = dict.fromkeys(OPS, 0)
    for name in OPS:
        monkeypatch.setattr(ops, name, counting(name, called))
    rehearse(make_lab(force_class="dynamic", merge="value").cache)
    assert all(called.values()), called


@pytest.mark.parametrize(
    "rereading",
    [{}, {"question_tokens": 8}, {"rereads_all": True}],
    ids=["none", "question", "all"],
)
def test_it_reaches_every_op_of_recall(
    monkeypatch: pytest.MonkeyPatch, rereading: dict[str, Any]
) -> None:
    names = [*OPS, "store", "load", "encode", "mark", "recall"]
    names += ["stage", "attend_part"] if rereading else []
    called = dict.fromkeys(names, 0)
    options = PolicyOptions(probe_tokens=8, force_class="dynamic", merge="value")
    lab = small_lab(replace(RECALL, **rereading), options=options)
    for name in names:
        monkeypatch.setattr(ops, name, counting(name, called))
    rehearse(lab.cache)
    assert all(called.values()), called
    assert not lab.cache.slots.requests
    assert (lab.recaller.tier.blocks == -1).all()


def counting(name: str, called: dict[str, int]) -> Any:
    op = getattr(ops, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return op(*args, **kwargs)

    return counted


def test_it_reaches_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads as long as a client's can be, and widths that 16 does and does not divide."""
    lab, widths = make_lab(), []
    score = ops.score

    def watched(*args: Any) -> ops.Scores:
        widths.append(args[-1])
        return score(*args)

    monkeypatch.setattr(ops, "score", watched)
    rehearse(lab.cache)
    rehearsed = set(widths)
    assert max(rehearsed) == QUOTA.max_head_tokens + QUOTA.chunk_tokens
    assert {width % 16 == 0 for width in rehearsed} == {True, False}
    widths.clear()
    serve(lab)
    assert max(widths) <= max(rehearsed)


def test_it_reaches_the_widths_of_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are joined are longer than those of a prefill, and so are the heads."""
    lab, widths = small_lab(tier_blocks=200, options=PolicyOptions(probe_tokens=8)), []
    score = ops.score

    def watched(*args: Any) -> ops.Scores:
        widths.append(args[-1])
        return score(*args)

    monkeypatch.setattr(ops, "score", watched)
    rehearse(lab.cache)
    rehearsed = max(widths)
    assert rehearsed == lab.quota.table_width_pages * lab.quota.page_tokens
    assert rehearsed > lab.quota.max_head_tokens + lab.quota.chunk_tokens
    widths.clear()
    lab.families = dict.fromkeys(("first", "second"), ("video", 380))
    for client in (Client("first", 390), Client("second", 390)):
        look_ahead(lab, client)
        run(lab, client, outputs=1)
    assert lab.found["second"].num_tokens == 376
    assert lab.quota.max_head_tokens + lab.quota.chunk_tokens < max(widths) <= rehearsed


def test_a_pool_of_one_quota_is_enough() -> None:
    rehearse(make_lab(pool_blocks=QUOTA.blocks).cache)


def test_a_smaller_pool_is_left_alone() -> None:
    """It took blocks with negative numbers, which a GPU would not have refused."""
    lab = make_lab(pool_blocks=QUOTA.blocks - 1)
    before = lab.pool.raw.clone()
    rehearse(lab.cache)
    assert torch.equal(lab.pool.raw, before)


def test_warm_up_requests_leave_no_record() -> None:
    """vLLM sends requests of its own through the worker before it serves any client."""
    lab = make_lab()
    with lab.cache.reports.paused():
        lab.step({Client("_warmup_0_", 2): 2})
        lab.step({}, finished=("_warmup_0_",))
    lab.step({Client("text", 2): 2})
    lab.step({}, finished=("text",))
    assert [record.request_id for record in lab.finished] == ["text"]
