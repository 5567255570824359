"""Tables of what was measured on the pretrained model."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.real.report import every_task_table, stored_table
from benchmarks.real.results import RunResult

ABOUT = {
    "command": "python -m benchmarks.real.run --plan some",
    "machine": "a machine",
    "model": "a model",
    "fingerprint": "0123",
    "suite_seed": 1,
    "page_tokens": 16,
}


def result(name: str, share: float | None, **marks: str) -> RunResult:
    return RunResult(
        name=name,
        policy="full" if share is None else "hybrid",
        quota_share=share,
        length_tokens=2048,
        right=marks,
        logprobs={task: [-0.5, -1.0] for task in marks},
        commit="abc",
    )


def test_a_task_that_not_all_were_asked_is_left_out() -> None:
    """The bug: a plan whose full cache answered a third task had no table, and no run a report."""
    results = [result("full", None, sign="11", signs="10"), result("hybrid", 0.1, sign="01")]
    table = every_task_table(results, ABOUT).splitlines()
    assert table[0] == "| policy | quota | one sign | mean log-probability |"
    assert table[2:4] == [
        "| full |  | 100; -0.75 | -0.75 |",
        "| hybrid | 10 % | 50; -0.75 | -0.75 |",
    ]


def test_what_8_bits_move_is_told_against_the_same_in_16() -> None:
    plain = replace(result("hybrid", 0.1, single="11"), quota_blocks=12, peak_blocks=12.0)
    plain = replace(plain, block_bytes=2**18)
    moved = {"single": [-0.7, -0.9]}
    quantised = {"cache_dtype": "fp8", "block_bytes": 2**17}
    alike = replace(plain, right={"single": "01"}, logprobs=moved, **quantised)
    # of equal bytes: held against the tenth, which has fewer tokens
    more = replace(alike, quota_share=0.1640625, quota_blocks=21, peak_blocks=21.0)
    full = result("full", None, single="11")
    alone = replace(full, name="vLLM alone")
    in_8_bits = replace(alone, cache_dtype="fp8")
    table = stored_table([full, plain, alike, more, alone, in_8_bits], ABOUT).splitlines()
    assert table[2:8] == [
        "| full |  | 16 bits |  | 100; -0.750 | -0.750 |  |  |",
        "| hybrid | 10 %, 192 tokens | 16 bits | 3 MiB | 100; -0.750 | -0.750 |  |  |",
        "| hybrid | 10 %, 192 tokens | 8 bits | 1.5 MiB | 50; -0.800 | -0.800 | 1, 0 "
        "| -0.050 (size 0.150, largest 0.20) |",
        "| hybrid | 16.4 %, 336 tokens | 8 bits | 2.62 MiB | 50; -0.800 | -0.800 | 1, 0 "
        "| -0.050 (size 0.150, largest 0.20) |",
        "| vLLM alone |  | 16 bits |  | 100; -0.750 | -0.750 |  |  |",
        "| vLLM alone |  | 8 bits |  | 100; -0.750 | -0.750 | 0, 0 "
        "| +0.000 (size 0.000, largest 0.00) |",
    ]


def test_a_continuation_has_a_perplexity_and_no_answers() -> None:
    plain = result("full", None, continuation="00")
    other = replace(plain, cache_dtype="fp8", logprobs={"continuation": [-0.5, -1.1]})
    table = stored_table([plain, other], ABOUT).splitlines()
    assert table[2] == "| full |  | 16 bits |  | perplexity 2.12 | -0.750 |  |  |"
    assert table[3].endswith("| -0.800 |  | -0.050 (size 0.050, largest 0.10) |")
