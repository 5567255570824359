"""The runner without an engine: what is measured, kept, reported, and what is refused."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.quality import models
from benchmarks.quality import worker as measuring
from benchmarks.quality.lab import Outcome
from benchmarks.quality.plan import FULL, HYBRID, Run
from benchmarks.quality.queueing import Cache, Worker, run_all
from benchmarks.quality.results import (
    QuotaExceededError,
    RunResult,
    Share,
    load_plan,
    save_plan,
    summarise,
)

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"tasks": ("needle", "count"), "count": 6}
RUNS = [replace(FULL, **SMALL), replace(HYBRID, **SMALL), replace(HYBRID, name="other", **SMALL)]


def outcomes(run: Run, **changes: Any) -> list[Outcome]:
    """Every second example is right; two layers of two heads, the first layer static."""
    record = {
        "request_id": "7",
        "peak_blocks": 25,
        "quota_blocks": 25,
        "block_bytes": 4096,
        "compressions": 3,
        "static_heads": [[True, True], [False, False]],
    }
    return [
        Outcome(
            task=task,
            length_tokens=run.length_tokens,
            depth=None,
            right=index % 2 == 0,
            text="",
            prompt_tokens=2000 + index,
            record=record | changes,
        )
        for task in run.tasks
        for index in range(run.count)
    ]


class FakeLab:
    """Measures at once, remembers what it measured, fails on some."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.measured: list[str] = []
        self.fails = fails

    def __call__(self, run: Run) -> RunResult:
        self.measured.append(run.title)
        if run.name in self.fails:
            raise RuntimeError("no memory")
        return summarise(run, outcomes(run), 1.0, "abc")


def measure(lab: FakeLab, cache: Cache) -> tuple[list[RunResult], dict[str, BaseException]]:
    workers = [Worker(lambda: ThreadPoolExecutor(1)) for _ in range(2)]
    found = run_all(RUNS, cache, lab, workers, "test")
    for worker in workers:
        worker.close()
    return found


def test_results_come_in_the_order_of_the_plan(tmp_path: Path) -> None:
    results, errors = measure(FakeLab(), Cache(tmp_path, "model", RunResult))
    assert [result.name for result in results] == ["full", "hybrid", "other"] and not errors


def test_finished_runs_are_not_measured_again(tmp_path: Path) -> None:
    first, _ = measure(FakeLab(), Cache(tmp_path, "model", RunResult))
    lab = FakeLab()
    again, _ = measure(lab, Cache(tmp_path, "model", RunResult))
    assert lab.measured == [] and again == first


@pytest.mark.parametrize("cache", [{"fingerprint": "other"}, {"fresh": True}])
def test_another_model_is_measured_again(tmp_path: Path, cache: dict[str, Any]) -> None:
    measure(FakeLab(), Cache(tmp_path, "model", RunResult))
    lab = FakeLab()
    measure(lab, replace(Cache(tmp_path, "model", RunResult), **cache))
    assert len(lab.measured) == len(RUNS)


def test_a_failure_does_not_stop_the_others_and_is_measured_again(tmp_path: Path) -> None:
    results, errors = measure(FakeLab(fails=("hybrid",)), Cache(tmp_path, "model", RunResult))
    assert [result.name for result in results] == ["full", "other"]
    assert str(errors[RUNS[1].title]) == "no memory"
    lab = FakeLab()
    results, errors = measure(lab, Cache(tmp_path, "model", RunResult))
    assert lab.measured == [RUNS[1].title] and len(results) == 3 and not errors


class DeadProcess(Executor):
    """Dies of the first thing it is given."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future


def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    processes = [DeadProcess(), ThreadPoolExecutor(1)]
    worker = Worker(lambda: processes.pop(0))
    results, errors = run_all(
        RUNS, Cache(tmp_path, "model", RunResult), FakeLab(), [worker], "test"
    )
    worker.close()
    assert list(errors) == [RUNS[0].title] and len(results) == 2


def test_summary_of_a_run() -> None:
    result = summarise(RUNS[1], outcomes(RUNS[1]), 2.04, "abc")
    assert result.answers == {"needle": "101010", "count": "101010"}
    assert result.share("needle") == Share(3, 6) and result.pooled(["needle", "count"]).value == 0.5
    assert (result.peak_blocks, result.quota_blocks, result.prompt_tokens) == (25.0, 25, 2002.5)
    assert result.static_share == [[1.0, 1.0], [0.0, 0.0]] and result.seconds == 2.0
    assert (result.block_bytes, result.cache_dtype, result.dtype) == (4096, "auto", "float32")
    quantised = replace(RUNS[1], cache_dtype="fp8", dtype="bfloat16")
    found = summarise(quantised, outcomes(quantised), 1.0, "abc")
    assert (found.cache_dtype, found.dtype) == ("fp8", "bfloat16")


def test_depths_go_round_and_counting_has_none() -> None:
    shares = summarise(RUNS[1], outcomes(RUNS[1]), 1.0, "").shares_by_depth(["needle", "count"])
    # the sixth example is at depth 0 again
    assert list(shares.values()) == [
        Share(1, 2),
        Share(0, 1),
        Share(1, 1),
        Share(0, 1),
        Share(1, 1),
    ]


def test_a_request_above_its_quota_fails_the_run() -> None:
    with pytest.raises(QuotaExceededError, match="held 26 blocks of a quota of 25"):
        summarise(RUNS[1], outcomes(RUNS[1], peak_blocks=26), 1.0, "")


def test_a_request_without_a_record_fails_the_run() -> None:
    found = outcomes(RUNS[1])
    found[3] = replace(found[3], record={})
    with pytest.raises(ValueError, match="1 of 12 requests left no record"):
        summarise(RUNS[1], found, 1.0, "")


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = [summarise(run, outcomes(run), 1.0, "abc") for run in RUNS]
    save_plan(tmp_path / "plan.json", {"commit": "abc"}, results)
    assert load_plan(tmp_path / "plan.json") == ({"commit": "abc"}, results)


def test_a_missing_model_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make train"):
        models.check_model(str(tmp_path / "model"))
    models.check_model("Qwen/Qwen2.5-VL-7B-Instruct")


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = models.fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert models.fingerprint(str(tmp_path)) != one
    assert models.fingerprint("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_only_the_labs_own_model_knows_the_notation(tmp_path: Path) -> None:
    sizes = '{"text_config": {"vocab_size": 512, "hidden_size": 128}}'
    (tmp_path / "config.json").write_text(sizes)
    assert models.knows_notation(str(tmp_path))
    (tmp_path / "config.json").write_text(sizes.replace("128", "3584"))
    assert not models.knows_notation(str(tmp_path))
    assert not models.knows_notation("Qwen/Qwen2.5-VL-7B-Instruct")


class StartedError(Exception):
    """In place of an engine."""


def test_the_engine_is_told_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def start(**arguments: Any) -> None:
        told.update(arguments)
        raise StartedError

    monkeypatch.setattr("vllm.LLM", start)
    monkeypatch.setattr(measuring, "free_memory", lambda: None)
    run = replace(FULL, cache_dtype="fp8", dtype="bfloat16", tasks=("needle",), count=1)
    for changed, stored in ((run, ("fp8", "bfloat16")), (RUNS[0], ("auto", "float32"))):
        with pytest.raises(StartedError):
            measuring.measure(changed, "model", {}, "abc")
        assert (told["kv_cache_dtype"], told["dtype"]) == stored
