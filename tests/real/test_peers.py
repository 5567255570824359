"""The peers without the peers: questions, what is judged, tables, pins, and what is recorded."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real.peers import accuracy, environments, report
from benchmarks.real.peers.clock import clock, resident_bytes
from benchmarks.real.peers.judged import Question, judge
from benchmarks.real.peers.prompts import question_of
from benchmarks.real.peers.speed import SYSTEMS, job_of
from benchmarks.real.plan import ALL_TASKS
from benchmarks.real.results import load_plan
from benchmarks.real.tasks import make_examples

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "benchmarks" / "results"
PEERS = ("kvpress", "openvino")
ABOUT = {
    "command": "a command",
    "commit": "abc",
    "machine": "a machine",
    "model": "a model",
    "fingerprint": "f00",
    "suite_seed": 1,
    "versions": {"kvpress": "1.2"},
}


@pytest.mark.parametrize(
    ("likeliest", "first", "exact"),
    [
        ([7, 8, 9], True, True),
        ([7, 8, 1], True, False),
        ([1, 8, 9], False, False),
        ([7, 8, 9, 4], True, True),
        ([7, 8], True, False),
    ],
)
def test_judge(likeliest: list[int], first: bool, exact: bool) -> None:
    question = Question("single", [1, 2, 3], 1, [7, 8, 9])
    found = judge(question, likeliest, [-1.0, -2.0, -6.0], 100.0, 10.0)
    assert (found.first, found.exact, found.logprob) == (first, exact, -3.0)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_questions_stand_last(task: str, tokenizer: Any) -> None:
    (example,) = make_examples(task, 1024, 1, tokenizer)
    question = question_of(example, tokenizer)
    asked = tokenizer.decode(question.prompt[question.question_start :])
    assert tokenizer.decode(question.prompt) == example.prompt(tokenizer)
    assert re.match(r"\n(What|Question)[^\n]*[?.]", asked)
    assert asked.endswith(example.prefix)
    assert tokenizer.decode(question.told) == example.told


def judged(task: str, exact: bool, logprob: float) -> dict[str, Any]:
    found = {"task": task, "first": True, "exact": exact, "logprob": logprob}
    return found | {"peak_tokens": 2000.0, "kept_tokens": 200.0 + exact}


def test_summarise() -> None:
    row = {"name": "snapkv", "share": 0.1}
    row["judged"] = [judged("a", True, -1.0), judged("b", False, -2.0), judged("a", False, -3.0)]
    found = accuracy.summarise(row, "in")
    assert found["exact"] == {"a": "10", "b": "0"}
    assert found["first"] == {"a": "11", "b": "1"}
    assert found["logprobs"] == {"a": [-1.0, -3.0], "b": [-2.0]}
    assert (found["peak_tokens"], found["kept_tokens"]) == (2000.0, 200.3)


def answered(name: str, share: float, mode: str, **exact: str) -> dict[str, Any]:
    logprobs = {task: [-0.5] * len(marks) for task, marks in exact.items()}
    found = {"name": name, "share": share, "mode": mode, "exact": exact, "logprobs": logprobs}
    return found | {"peak_tokens": 2000.0, "kept_tokens": 2000 * share, "commit": "abc"}


def test_accuracy_table_leaves_out_what_transformers_does_not_solve() -> None:
    rows = [
        answered("transformers", 1.0, "in", single="1111111111", hard="1111100000"),
        answered("transformers", 1.0, "after", single="1111111111", hard="1111100000"),
        answered("snapkv", 0.1, "in", single="1111100000", hard="1111111111"),
        answered("snapkv", 0.2, "in", single="1111111111", hard="1111111111"),
        answered("kvzip", 0.2, "after", single="1111111111", hard="1111111111"),
    ]
    lines = report.accuracy_table(rows, ABOUT).splitlines()
    assert lines[0] == "| system | the question is | 10 % | 20 % | peak tokens | kept tokens |"
    full = "100 (72-100); -0.50"
    assert lines[2] == f"| transformers, full cache |  | {full} | {full} | 2,000 | 2,000 |"
    assert lines[3].startswith("| kvpress SnapKV | compressed with the text | 50 (24-76); -0.50 |")
    assert lines[3].endswith("| 2,000 / 2,000 | 200 / 400 |")
    assert lines[4].startswith("| kvpress KVzip | after the compressed text |  | 100 (72-100)")
    assert "kvpress 1.2; float32, 2,048 tokens, tasks single;" in lines[-1]


def test_accuracy_table_needs_a_full_cache() -> None:
    with pytest.raises(ValueError, match="no full cache of transformers"):
        report.accuracy_table([answered("snapkv", 0.1, "in", single="1")], ABOUT)


def test_speed_table_compares_with_hybrid() -> None:
    mib = 2**20
    ours = {"name": "hybrid", "length_tokens": 2048, "prompt_tokens": 2021, "repeats": 3}
    ours |= {"first_token_seconds": 2.0, "decode_ms": 10.0, "kv_peak_bytes": 10 * mib}
    ours |= {"kv_decode_bytes": 5 * mib, "idle_bytes": 900 * mib, "peak_bytes": 1000 * mib}
    theirs = ours | {"name": "vLLM", "decode_ms": 15.0, "kv_peak_bytes": 94 * mib}
    theirs |= {"peak_bytes": 1100 * mib}
    lines = report.speed_table([theirs, ours], ABOUT).splitlines()
    assert lines[2] == (
        "| vLLM | 2,021 | 2.00 s (1.0x) | 15.0 ms (1.5x) | 94.0 MiB (9.4x) | 5.0 MiB (1.0x) "
        "| 1100 MiB (1.1x) | 200 MiB |"
    )


def test_clock_counts_what_was_resident_in_between() -> None:
    """What was let go before the request does not count, what was let go in it does."""
    size = 64 * 2**20
    steps = []

    def hold(num_bytes: int) -> None:
        # not from an allocator, which may have it at hand or keep it
        with mmap.mmap(-1, num_bytes) as pages:
            for start in range(0, num_bytes, mmap.PAGESIZE):
                pages[start] = 1

    hold(2 * size)
    sample = clock(5, lambda: hold(size), lambda: steps.append(1), 3, lambda: (7.0, 6.0))
    assert 0.9 * size < sample.peak_bytes - sample.idle_bytes < 1.5 * size
    assert resident_bytes() < sample.peak_bytes
    assert len(steps) == 3
    assert (sample.kv_peak_bytes, sample.kv_decode_bytes) == (7.0, 6.0)


@pytest.mark.parametrize("peer", PEERS)
def test_everything_is_pinned(peer: str) -> None:
    lines = environments.requirements(peer).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    # torch comes first, alone, and is the engine's
    assert not any(pin.startswith(("torch==", "torchvision==")) for pin in pins)
    engine = (REPOSITORY / "tools" / "env.py").read_text(encoding="utf-8")
    assert f'TORCH_VERSION = "{environments.TORCH.removeprefix("torch==")}"' in engine


def test_openvino_may_hold_what_we_may_hold() -> None:
    limits = {
        job.title: job.options["limit_tokens"]
        for job in accuracy.jobs(1)
        if job.peer == "openvino" and job.options["share"] < 1
    }
    assert sorted(limits.values()) == [192, 192, 384, 384, 1024, 1024]
    assert len({job.key("f00") for job in accuracy.jobs(1)}) == len(accuracy.jobs(1))


def test_the_engine_is_timed_under_a_tenth() -> None:
    (ours,) = [system for system in SYSTEMS if system.name == report.BASE]
    budget = job_of(ours, "model", 2048)["engine"]["additional_config"]["budgetkv"]
    assert budget["quota_tokens"] == 192
    (stock,) = [system for system in SYSTEMS if system.name == "vLLM"]
    assert "additional_config" not in job_of(stock, "model", 2048)["engine"]


def test_recorded_full_caches_agree() -> None:
    """Same weights, same prompts, same answers: what transformers, OpenVINO and we find likely."""
    content = json.loads((RECORDED / report.FILE).read_text(encoding="utf-8"))
    (ours,) = [run for run in load_plan(RECORDED / report.OURS)[1] if run.quota_share is None]
    full = [row for row in content["accuracy"]["rows"] if row["share"] == 1]
    assert "transformers" in {row["name"] for row in full}
    for row in full:
        for task, logprobs in row["logprobs"].items():
            assert logprobs == pytest.approx(ours.logprobs[task], abs=5e-3), row["name"]
