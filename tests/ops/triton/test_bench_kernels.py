"""The kernel bench without a GPU: its checks, its cases on tiny shapes, and its peers' layouts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.kernels import attention, compression, launches, peers, policy, recall, work
from benchmarks.kernels.caches import build_cache, equal_lens, ragged_lens
from benchmarks.kernels.checks import SMALL
from benchmarks.kernels.peers import Batch
from benchmarks.kernels.recall_checks import check_recall
from benchmarks.kernels.report import Report
from benchmarks.kernels.rows import Bench
from benchmarks.kernels.shapes import QWEN25_VL_7B, ModelShape
from benchmarks.kernels.timing import Ceilings, Timing
from benchmarks.kernels.verdicts import Verdict
from tests.ops.factories import batch_rows
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops.reference.attend import attend as attend_reference
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.reference.load import load as load_reference
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.reference.recall import recall as recall_reference
from vllm_budgetkv.ops.reference.stage import stage as stage_reference
from vllm_budgetkv.ops.reference.store import store as store_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
TINY = ModelShape("tiny", 2, 32, 64, 4, 2, head_size=32)
SIZES = {
    attention: {
        "QWEN25_VL_7B": TINY,
        "LONG_TOKENS": 60,
        "QUICK_DECODES": ((20, 2),),
        "RAGGED_DECODES": ((2, 20),),
        "RETRIEVALS": ((2, 60),),
        "BUDGET_ROWS": 2,
        "CHUNK_TOKENS": 6,
        "MODELS": (TINY,),
    },
    compression: {
        "QWEN25_VL_7B": TINY,
        "CHUNK_TOKENS": 6,
        "BUDGET_TOKENS": 30,
        "HELD_TOKENS": 36,
        "DECODE_ROWS": 3,
        "PROBE_TOKENS": 3,
    },
    policy: {
        "QWEN25_VL_7B": TINY,
        "CHUNK_TOKENS": 6,
        "BUDGET_TOKENS": 30,
        "HELD_TOKENS": 36,
        "TEXT_TOKENS": 4,
        "FRAME_TOKENS": 5,
    },
    recall: {
        "QWEN25_VL_7B": TINY,
        "PROMPT_TOKENS": (150, 300),
        "BUDGET_SHARE": 0.4,
        "CHUNK_TOKENS": 6,
        "HOST_COPY_BYTES": 64,
    },
    launches: {
        "QWEN25_VL_7B": TINY,
        "STEP_ROWS": 2,
        "STEP_TOKENS": 20,
        "PROOF_LAYERS": 1,
        "PROOF_ROWS": 2,
        "PROOF_TOKENS": 15,
        "PROOF_STEPS": 3,
        "HOST_ROWS": 2,
        "HOST_TOKENS": 9,
    },
}


class OneCall:
    """A clock that runs what it times once."""

    def ceilings(self) -> Ceilings:
        return Ceilings(1e9, 1e12, 1e-6)

    def measure(self, run: Callable[[], object], reset: Callable[[], None] | None = None) -> Timing:
        if reset is not None:
            reset()
        run()
        return Timing(1e-3, captured=True)


def one_call(
    run: Callable[[], object], launches: int, reset: Callable[[], None] | None = None
) -> float:
    return OneCall().measure(run, reset).seconds


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Bench:
    for module, sizes in SIZES.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(launches, "capture", lambda run: SimpleNamespace(replay=run))
    monkeypatch.setattr(launches, "host_seconds", one_call)
    monkeypatch.setattr(policy, "host_seconds", one_call)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return Bench(OneCall(), OneCall().ceilings(), 8, quick=True, device=CPU)


def run_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit status, the lines printed before the last one, and the last one's content."""
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--check"])
    with pytest.raises(SystemExit) as stop:
        bench_kernels.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return stop.value.code, lines, json.loads(last)


def test_check_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, summary = run_check(monkeypatch, capsys)
    assert status == 0, summary["wrong"]
    assert summary["wrong"] == []
    assert summary["checks"] > 300


def test_a_wrong_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that leaves out the last token of every head, and one that answers NaN."""
    attend, select = ops.attend, ops.select

    def attend_nan(*arguments: Any) -> None:
        attend(*arguments)
        arguments[3][0, 0] = torch.nan

    def select_fewer(
        scores: torch.Tensor, tiers: torch.Tensor, lens: torch.Tensor, budgets: torch.Tensor
    ) -> torch.Tensor:
        return select(scores, tiers, lens, budgets - 1)

    monkeypatch.setattr(ops, "attend", attend_nan)
    monkeypatch.setattr(ops, "select", select_fewer)
    status, lines, summary = run_check(monkeypatch, capsys)
    assert status == 1 and {each["op"] for each in summary["wrong"]} == {"attend", "select"}
    assert any(line.startswith("WRONG: attend, decode, small") for line in lines)


def late(op: Callable[..., None], key: Any, value: Any, rows: Any, tier: Any) -> None:
    op(key, value, rows._replace(first_position=rows.first_position + 1), tier)


def stage_others(pages: Any, pool: Any, slot: int, first_block: int, tier: Any) -> None:
    stage_reference(pages, pool, slot, first_block + 1, tier)


def encode_far(slot: int, tier: Any, recalls: Any, pool: Any, energy: Any) -> None:
    """One code is two levels off."""
    encode_reference(slot, tier, recalls, pool, energy)
    pool.index_words[int(recalls.table[slot, 0, 0]), 3 * pool.layout.code_words] ^= 2


def encode_others(*arguments: Any) -> None:
    """The channels of another head's queries."""
    *others, energy = arguments
    encode_reference(*others, energy.roll(1, 0))


def encode_disorder(slot: int, tier: Any, recalls: Any, pool: Any, energy: Any) -> None:
    """A channel of the second page is no channel."""
    encode_reference(slot, tier, recalls, pool, energy)
    pool.digests[int(recalls.table[slot, 0, 1]), 1, 15] = 32.0


def encode_off(slot: int, tier: Any, recalls: Any, pool: Any, energy: Any) -> None:
    """Of a channel without codes, all is known by its mean."""
    encode_reference(slot, tier, recalls, pool, energy)
    digest = pool.digests[int(recalls.table[slot, 1, 1])]
    coded = digest[1, 8:16].tolist()
    digest[0, next(channel for channel in range(32) if channel not in coded)] += 1.0


def mark_more(slot: int, heads: Any, recalls: Any) -> None:
    mark_reference(slot, heads, recalls)
    heads.pool.positions[int(recalls.table[slot, 0, 0]), 0] ^= 1


def recall_half(query: Any, heads: Any, *others: Any) -> None:
    """The value of one token does not come."""
    recall_reference(query, heads, *others)
    heads.pool.values[int(heads.table[0, 0, 0]), 0] = 0.0


def recall_held(query: Any, heads: Any, *others: Any) -> None:
    recall_reference(query, heads, *others)
    pages = heads.table[0, 0].long()
    held = heads.lens[0, 0] - 1
    page = pages[held // heads.page_tokens]
    heads.pool.positions[pages[0], 0] = heads.pool.positions[page, held % heads.page_tokens]


def recall_uncounted(*arguments: Any) -> None:
    recall_reference(*arguments)
    arguments[-1].zero_()


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("store", partial(late, store_reference), "host blocks"),
        ("load", partial(late, load_reference), "keys and values"),
        ("stage", stage_others, "pages"),
        ("encode", encode_far, "codes"),
        ("encode", encode_others, "channels"),
        ("encode", encode_disorder, "channels"),
        ("encode", encode_off, "means and steps"),
        ("mark", mark_more, "pages"),
        ("recall", lambda query, *others: recall_reference(-query, *others), "lacking mass"),
        ("recall", recall_half, "keys and values"),
        ("recall", recall_held, "held or twice"),
        ("recall", recall_uncounted, "moved"),
    ],
)
def test_a_wrong_op_of_recall_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., None], found: str
) -> None:
    names = ("store", "load", "stage", "encode", "mark", "recall")
    modules = {op: import_module(f"vllm_budgetkv.ops.reference.{op}") for op in names}
    references = {op: getattr(module, op) for op, module in modules.items()}
    for op, reference in (references | {name: wrong}).items():
        monkeypatch.setattr(ops, op, reference)
    torch.manual_seed(0)
    failed = [each for each in check_recall(SMALL, torch.bfloat16, CPU) if not each.holds]
    assert {each.op for each in failed} == {name}
    assert any(found in each.what for each in failed)


@pytest.mark.parametrize("name", bench_kernels.SECTIONS)
def test_sections_run(tiny: Bench, name: str) -> None:
    section, _ = bench_kernels.SECTIONS[name]
    rows = list(section(tiny))
    assert rows
    for row in rows:
        assert row.work is None or row.work.bytes > 0
        assert row.as_json(tiny.ceilings)["seconds"] == 1e-3


def test_recall_rows_count_what_moves(tiny: Bench) -> None:
    """Nothing stands in the recall pages at first, then about seven of ten."""
    tiny = replace(tiny, quick=False)
    rows = [row for row in recall.recall(tiny) if row.section == "recall"]
    assert [row.figures["tokens"] for row in rows] == [150, 150, 300, 300]
    for new, some in (rows[:2], rows[2:]):
        assert new.figures["moved"] == new.figures["recalled"] == some.figures["recalled"] > 0
        assert 0 < some.figures["moved"] < new.figures["moved"]
        for row in (new, some):
            assert row.work.host_bytes == row.figures["moved"] * 2 * TINY.head_size * 2


def test_no_time_for_a_wrong_kernel(
    tiny: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """`select` is wrong, so what needs it has no time; the rest is in the file."""
    monkeypatch.setattr(bench_kernels, "Clock", lambda seconds: OneCall())
    report = Report(verdicts=[Verdict("select", "keep", 1.0, 0.0)])
    asked = {"only": ["compress", "retrieval"], "quick": True, "check": False, "page_tokens": 8}
    options = Namespace(**asked, seconds_per_case=0.0, limit_seconds=600, out=tmp_path)
    bench_kernels.measure(options, report, CPU)
    assert {row.section for row in report.rows} == {"retrieval"}
    assert report.left_out == ["compress: select wrong"]
    assert "TFLOP/s" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert [row["section"] for row in written["rows"]] == ["retrieval", "retrieval"]
    assert written["rows"][0]["share_of_copy"] > 0
    assert written["wrong"][0]["op"] == "select"


def test_graph_proof_compares(tiny: Bench) -> None:
    assert all(verdict.holds for verdict in launches.prove_capture(tiny))


def test_graph_proof_can_fail(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "capture", lambda run: SimpleNamespace(replay=lambda: None))
    assert not all(verdict.holds for verdict in launches.prove_capture(tiny))


def test_bars(tiny: Bench) -> None:
    report = Report(ceilings=tiny.ceilings)
    assert {bar.state for bar in report.bars()} == {"not measured"}
    report.rows += list(compression.compress_step(tiny))
    (bar,) = [bar for bar in report.bars() if bar.value is not None]
    assert bar.state == "FAIL" and "compress" in bar.name


def naive_varlen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **numbers: Any
) -> torch.Tensor:
    """What a paged FlashAttention call computes, from its own arguments alone."""
    out = torch.empty_like(query)
    starts, group = numbers["cu_seqlens_q"].tolist(), query.shape[1] // keys.shape[2]
    for index, count in enumerate(numbers["seqused_k"].tolist()):
        held = [field[numbers["block_table"][index].long()] for field in (keys, values)]
        key, value = (field.flatten(0, 1)[:count].float() for field in held)
        asked = query[starts[index] : starts[index + 1]].float()
        mask = torch.ones(len(asked), count, dtype=torch.bool).tril(count - len(asked))
        for head in range(query.shape[1]):
            scores = asked[:, head] @ key[:, head // group].T * numbers["softmax_scale"]
            weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
            mixed = weights @ value[:, head // group]
            out[starts[index] : starts[index + 1], head] = mixed.to(out.dtype)
    return out


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_interface")
    module.is_fa_version_supported = lambda version: False  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = naive_varlen  # type: ignore[attr-defined]
    name = "vllm.vllm_flash_attn.flash_attn_interface"
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", ModuleType("vllm.vllm_flash_attn"))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["sdpa", "flash (vllm)", "flash by head (vllm)"])
def test_peers_do_the_same_work(fake_vllm: None, name: str, tokens: int) -> None:
    peer = (peers.WHOLE_REQUEST | peers.HEADWISE)[name]
    shape = ragged_lens if "by head" in name else equal_lens
    cache = build_cache(shape(3, 2, 21), PageLayout(8, 32, torch.float32), CPU)
    query = torch.randn(3 * tokens, 6, 32)
    expected = torch.empty_like(query)
    rows = batch_rows(range(3), [tokens] * 3)
    attend_reference(query, cache.heads, rows, expected, 32**-0.5)
    torch.testing.assert_close(peer(Batch(query, cache, tokens))(), expected, rtol=1e-4, atol=1e-5)


def test_ragged_heads_are_refused_by_whole_request_peers() -> None:
    cache = build_cache(ragged_lens(2, 2, 20), PageLayout(8, 32, torch.float32), CPU)
    with pytest.raises(ValueError, match="differ in length"):
        peers.sdpa(Batch(torch.randn(2, 4, 32), cache, 1))


def test_work_of_a_7b() -> None:
    """The figures of docs/performance.md."""
    model, heads, page = QWEN25_VL_7B, QWEN25_VL_7B.kv_heads, 32
    held, kept = 4024 * heads, 3000 * heads
    counted = {
        "append": (work.append(model, 1024), 4.21, 0),
        "decode": (work.attend(model, 1, kept, page), 6.16, 43),
        "chunk": (work.attend_chunk(model, 1024, held, page), 22.9, 51_564),
        "score": (work.score(model, held, 32), 8.50, 923),
        "contrast": (work.contrast(model, held), 4.18, 8.2),
        "select": (work.select(held), 0.10, 0),
        "compact": (work.compact(model, held, kept), 12.4, 0),
        "digest": (work.digest(model, kept, page), 3.26, 0),
        "retrieve": (work.retrieve(model, heads * 94), 0.20, 1.3),
        "merge": (work.merge(model, kept, held - kept, heads), 11.3, 3146),
    }
    # a prompt of 30,000 tokens, of which heads hold 2,249 and recall 1,312
    asked, recalled = 30_000 * heads, 1312 * heads
    some = work.recall(model, heads, asked, recalled, 0.3 * recalled, page)
    counted |= {
        "store": (work.store(model, 1024), 2.10, 0),
        "encode": (work.encode(model, heads, asked, page), 1.97, 0),
        "mark": (work.mark(asked, 2249 * heads), 0.051, 0),
        "recall, 30 % new": (some, 2.82, 54),
        "recall": (work.recall(model, heads, asked, recalled, recalled, page), 4.72, 54),
    }
    host = {"store": 2.10, "encode": 30.7, "mark": 0, "recall, 30 % new": 0.81, "recall": 2.69}
    for op, megabytes in host.items():
        assert counted[op][0].host_bytes / 1e6 == pytest.approx(megabytes, rel=0.01), op
    assert some.floor_seconds(4.8e12, 989e12, 50e9) == pytest.approx(16.1e-6, rel=0.01)
    for op, (found, megabytes, megaflops) in counted.items():
        assert found.bytes / 1e6 == pytest.approx(megabytes, rel=0.04), op
        assert found.flops / 1e6 == pytest.approx(megaflops, rel=0.04), op
    parts = [counted[op][0] for op in ("score", "contrast", "select", "compact")]
    step = sum(parts[1:], start=parts[0]) * model.layers
    assert step.bytes / 1e6 == pytest.approx(705, rel=0.001)
    assert step.floor_seconds(4.8e12, 989e12) == pytest.approx(0.15e-3, rel=0.03)
    assert model.layer_weights * model.layers == pytest.approx(6.5e9, rel=0.01)
    assert model.forward_flops(1024, 3000 + 512) == pytest.approx(14.8e12, rel=0.001)
