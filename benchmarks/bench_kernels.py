"""Times the Triton kernels on a GPU: microseconds, bytes/s and FLOP/s against what the card does.

    python -m benchmarks.bench_kernels [--quick] [--check | --no-check] [--only decode budget ...]

Every kernel is compared with its reference first, and one that is wrong gets no time. Copy
bandwidth and matrix products are measured in the same run, and so are other libraries' attention
kernels, if they can be imported. Rates count the bytes and operations of docs/performance.md. The
file `kernels_<card>.json` gets all of it; the last line of the output is a summary in JSON. The
exit status is 1 if a kernel is wrong.

The section `recall` pins up to 8 GB of host memory.

`--check` compares and does not time; without a GPU it does so in Triton's interpreter, on small
caches: `TRITON_INTERPRET=1 python -m benchmarks.bench_kernels --check`.

`--no-check` times kernels that `--check` has compared on this card: `kernels` in both summaries,
the hash of their sources, must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import attention, compression, launches, policy, recall
from benchmarks.kernels.checks import SMALL, representative, run_checks
from benchmarks.kernels.report import Report, about, file_name
from benchmarks.kernels.rows import Bench
from benchmarks.kernels.shapes import QWEN25_VL_7B
from benchmarks.kernels.timing import Clock
from benchmarks.kernels.verdicts import wrong_ops
from vllm_budgetkv.ops import backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.rows import Row

RESULTS = Path(__file__).parent / "results"
# sections in the order in which they are worth their time, and the ops that they time
SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Row]], set[str]]] = {
    "compress": (compression.compress_step, {"score", "contrast", "select", "compact"}),
    "budget": (attention.budget, {"attend"}),
    "retrieval": (attention.retrieved_decode, {"retrieve", "attend"}),
    "decode": (attention.decode, {"attend"}),
    "recall": (recall.recall, {"store", "encode", "mark", "recall"}),
    "ops": (
        compression.single_ops,
        {"append", "reserve", "score", "contrast", "select", "compact", "digest", "merge"},
    ),
    "prefill": (attention.prefill, {"attend"}),
    "step": (launches.step, {"append", "retrieve", "attend", "graph"}),
    "host": (launches.host, set()),
    "ragged": (attention.ragged_decode, {"attend"}),
    # last, since compiling may fail
    "policy": (policy.policy, {"score", "contrast"}),
}


def main() -> None:
    options = parse_arguments()
    device = choose_device(options.check)
    report = Report()
    all_sizes = [SMALL]
    if device.type == "cuda":
        all_sizes.append(representative(QWEN25_VL_7B, options.page_tokens))
    if not options.no_check:
        report.verdicts += run_checks(all_sizes, device, print)
    if device.type == "cuda":
        measure(options, report, device)
    wrong = wrong_ops(report.verdicts)
    print(f"{len(report.verdicts)} comparisons, wrong: {', '.join(sorted(wrong)) or 'none'}")
    for bar in report.bars() if not options.check else []:
        print(bar)
    print(json.dumps(report.summary()))
    sys.exit(1 if wrong else 0)


def measure(options: argparse.Namespace, report: Report, device: torch.device) -> None:
    """Prove that a graph holds a decode step, then time every section, until the limit."""
    started = time.monotonic()
    clock = Clock(options.seconds_per_case)
    report.ceilings = ceilings = clock.ceilings()
    bench = Bench(clock, ceilings, options.page_tokens, options.quick, device)
    report.verdicts += launches.prove_capture(bench)
    if options.check:
        return
    print(
        f"{about()['card']}: copy {ceilings.copy_bytes_per_second / 1e9:.0f} GB/s, "
        f"matmul {ceilings.matmul_flops_per_second / 1e12:.0f} TFLOP/s, "
        f"an empty kernel {ceilings.floor_seconds * 1e6:.1f} us; {about()['clock']}",
        flush=True,
    )
    wrong = wrong_ops(report.verdicts)
    path = options.out / file_name(options.quick)
    for name in options.only or SECTIONS:
        section, needs = SECTIONS[name]
        if needs & wrong:
            report.leave_out(f"{name}: {', '.join(sorted(needs & wrong))} wrong")
            continue
        num_rows = len(report.rows)
        for row in section(bench):
            report.add(row)
            if time.monotonic() - started > options.limit_seconds:
                break
        print_refusals(report.rows[num_rows:])
        report.write(path)
        if time.monotonic() - started > options.limit_seconds:
            report.leave_out(f"what follows in and behind {name}: {options.limit_seconds:g} s over")
            break
    print(f"{time.monotonic() - started:.0f} s, written to {path}", flush=True)


def print_refusals(rows: list[Row]) -> None:
    """Say once per section why a peer has no time."""
    reasons = {peer: why for row in rows for peer, why in row.refused.items()}
    for peer, reason in reasons.items():
        print(f"  no peer: {peer}: {reason}", flush=True)


def choose_device(check: bool) -> torch.device:
    """The GPU; else the CPU for `--check` in Triton's interpreter.

    Raises:
        SystemExit: there is neither, or another backend than Triton serves the GPU.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if backend.of(torch.empty(0, device=device)) != "triton":
            sys.exit(f"{backend.BACKEND_VARIABLE} keeps Triton from the GPU; unset it")
        return device
    if not check or os.environ.get(backend.INTERPRETER_VARIABLE) != "1":
        sys.exit(
            "there is no CUDA device: pass --check and set "
            f"{backend.INTERPRETER_VARIABLE}=1 to check the kernels in Triton's interpreter"
        )
    os.environ[backend.BACKEND_VARIABLE] = "triton"
    return torch.device("cpu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, within two minutes")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--check", action="store_true", help="compare with references only")
    checks.add_argument("--no-check", action="store_true", help="time only what was compared")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to time")
    parser.add_argument("--page-tokens", type=int, default=32)
    parser.add_argument("--seconds-per-case", type=float, default=0.05)
    parser.add_argument("--limit-seconds", type=float, default=380, help="no case starts later")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
