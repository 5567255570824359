"""Do head classes move: between text and video, between tasks, and from chunk to chunk?

    python -m benchmarks.quality.heads --count 8 --out benchmarks/results/quality_heads.json

Prompts of several tasks, with videos and of text alone, run one at a time under policy `hybrid`.
At every compression of a prefill each KV head's concentration is noted, and the class that it would
have at several thresholds. What is kept follows the default threshold, whichever is asked about.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.quality import heads_plot, reader
from benchmarks.quality.inside import cache_of, closing, in_order, prepare_environment
from benchmarks.quality.lab import Lab, Setup
from benchmarks.quality.provenance import settings_of
from benchmarks.quality.suite import TASKS, make_examples
from benchmarks.quality.text_tasks import TEXT_TASKS, make_text_examples
from vllm_budgetkv.policy.classify import classify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_budgetkv.policy import Observation, PolicyOptions, Retention

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ANSWER_ROOM_TOKENS = 64


@dataclass(frozen=True)
class Trace:
    """The heads of one prompt. C compressions, L layers, H KV heads, T thresholds.

    Attributes:
        seen_tokens: prompt tokens seen at each compression.
        concentration: float64 [C, L, H], top-k mass of the least concentrated query head.
        is_static: bool [T, C, L, H].
    """

    seen_tokens: list[int]
    concentration: np.ndarray
    is_static: np.ndarray


@dataclass
class Pieces:
    """Parts of a `Trace`, in the order in which the policy is asked."""

    seen_tokens: list[int] = field(default_factory=list)
    concentration: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    is_static: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def see(self, observation: Observation, options: PolicyOptions) -> None:
        """Note one layer of one compression.

        Raises:
            ValueError: nothing was scored.
        """
        layer, num_heads = observation.layer, observation.shape[0]
        if observation.topk_mass is None:
            raise ValueError(
                f"no probe behind {observation.seen_tokens} tokens, so heads have no class: use a "
                "policy that scores, with its look-ahead"
            )
        if layer == 0:
            self.seen_tokens.append(observation.seen_tokens)
        self.concentration[layer].append(observation.topk_mass.view(num_heads, -1).amin(dim=1))
        before = self.is_static[layer]
        classes = [
            classify(
                replace(observation, was_static=before[-1][index] if before else None),
                replace(options, static_threshold=threshold),
            )
            for index, threshold in enumerate(THRESHOLDS)
        ]
        before.append(torch.stack(classes))

    def trace(self) -> Trace:
        layers = sorted(self.is_static)
        concentration = [torch.stack(self.concentration[layer]) for layer in layers]
        is_static = [torch.stack(self.is_static[layer], dim=1) for layer in layers]
        return Trace(
            self.seen_tokens,
            torch.stack(concentration, dim=1).double().numpy(),
            torch.stack(is_static, dim=2).numpy(),
        )


@contextmanager
def traced(lab: Lab) -> Iterator[dict[str, Pieces]]:
    """Note every compression of a prefill inside the `with`, by request id.

    Raises:
        ValueError: the lab runs several requests at once; a policy is not told whose
            tokens it sees.
    """
    cache = cache_of(lab)
    if cache.tables.lens.shape[0] != 1:
        raise ValueError("several requests may run at once: set max_num_seqs to 1")
    policy, options = cache.slots.rules.offers[0].policy, cache.layers.compressor.options
    retain = policy.retain
    found: dict[str, Pieces] = defaultdict(Pieces)

    def see_and_retain(observation: Observation) -> Retention:
        if cache.step is not None:  # decode compacts between two steps
            (plan,) = cache.step.plans
            found[plan.request.request_id].see(observation, options)
        return retain(observation)

    policy.retain = see_and_retain
    try:
        yield found
    finally:
        del policy.retain


def dynamic_share(traces: Sequence[Trace]) -> np.ndarray:
    """Share of the prompts behind whose prefill a head is dynamic, [T, L, H]."""
    return np.mean([~trace.is_static[:, -1] for trace in traces], axis=0)


def change_rates(traces: Sequence[Trace]) -> np.ndarray:
    """Share of the heads whose class differs from that of the chunk before, [T, C - 1, L].

    Mean over the prompts; C is that of the prompt with the fewest compressions.
    """
    count = min(len(trace.seen_tokens) for trace in traces)
    classes = np.stack([trace.is_static[:, :count] for trace in traces])
    return (classes[:, :, 1:] != classes[:, :, :-1]).mean(axis=(0, 4))


def agreement(share: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Chance that a prompt of each of two groups gives a head the same class, mean over heads.

    Args:
        share: [T, L, H], share of one group's prompts on which a head is dynamic.
        other: the same of the other group.

    Returns:
        [T].
    """
    return (share * other + (1 - share) * (1 - other)).mean(axis=(1, 2))


def majority_agreement(share: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of the heads that are dynamic on most prompts of both groups or of neither, [T]."""
    return ((share > 0.5) == (other > 0.5)).mean(axis=(1, 2))


def summarise(traces: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """Everything of the report, by task and between text and video.

    Args:
        traces: by task; keys of `TEXT_TASKS` are text alone.
    """
    shares = {task: dynamic_share(of_task) for task, of_task in traces.items()}
    text = [share for task, share in shares.items() if task in TEXT_TASKS]
    video = [share for task, share in shares.items() if task not in TEXT_TASKS]
    report: dict[str, Any] = {
        "thresholds": THRESHOLDS,
        "tasks": {task: _describe(of_task, shares[task]) for task, of_task in traces.items()},
    }
    if len(video) > 1:
        pairs = [agreement(one, other) for one, other in combinations(video, 2)]
        report["agreement_of_two_video_tasks"] = np.mean(pairs, axis=0).tolist()
    if text and video:
        pairs = [agreement(one, other) for one in text for other in video]
        means = np.mean(text, axis=0), np.mean(video, axis=0)
        report["agreement_of_text_and_video_task"] = np.mean(pairs, axis=0).tolist()
        report["majority_agreement_of_text_and_video"] = majority_agreement(*means).tolist()
    return report


def _describe(traces: Sequence[Trace], share: np.ndarray) -> dict[str, Any]:
    changes = change_rates(traces)
    first = np.stack([trace.concentration[0] for trace in traces])
    last = np.stack([trace.concentration[-1] for trace in traces])
    return {
        "prompts": len(traces),
        "compressions": [len(trace.seen_tokens) for trace in traces],
        "dynamic_share": share.tolist(),
        "change_rate_by_chunk": changes.mean(axis=2).tolist(),
        "change_rate_by_layer": changes.mean(axis=1).tolist(),
        # layer by layer: [quantiles, L]
        "concentration_quantiles_of_first_chunk": _quantiles(first),
        "concentration_quantiles_of_last_chunk": _quantiles(last),
    }


def _quantiles(concentration: np.ndarray) -> list[list[float]]:
    """Of [prompts, L, H], over prompts and heads."""
    return np.quantile(concentration, QUANTILES, axis=(0, 2)).tolist()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trace all tasks in one engine; the settings and what `summarise` makes of the traces."""
    setup = Setup(
        model=str(options.model),
        budget={
            "policy": "hybrid",
            "quota_tokens": round(options.quota * options.length),
            "chunk_tokens": options.chunk_tokens,
            "decode_interval_tokens": 16,
        },
        max_model_len=options.length + options.length // 4 + ANSWER_ROOM_TOKENS,
        engine={"max_num_batched_tokens": 1024, "max_num_seqs": 1},
    )
    traces = {}
    lab = Lab(setup)
    with closing(lab):
        for task in options.tasks:
            make = make_text_examples if task in TEXT_TASKS else make_examples
            with traced(lab) as found:
                lab.ask(make(task, options.length, options.count))
            traces[task] = [pieces.trace() for pieces in in_order(found)]
    settings = settings_of(options)
    return {"settings": settings} | summarise(traces)


def table(report: dict[str, Any]) -> str:
    """Markdown: per task, the share of dynamic heads and the class changes at each threshold."""
    thresholds = report["thresholds"]
    lines = ["| task | " + " | ".join(f"S >= {t}" for t in thresholds) + " |"]
    lines.append("|---|" + "---|" * len(thresholds))
    for task, found in report["tasks"].items():
        shares = np.mean(found["dynamic_share"], axis=(1, 2))
        changes = np.mean(found["change_rate_by_layer"], axis=1)
        cells = [f"{s:.0%}, {c:.1%}" for s, c in zip(shares, changes, strict=True)]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    for name in (name for name in report if "agreement" in name):
        cells = [f"{value:.0%}" for value in report[name]]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    return text.split(",")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the classes of heads move.")
    tasks = ["needle", "distractors", "detail", "count", "page", "note", *TEXT_TASKS]
    parser.add_argument("--model", type=Path, default=reader.FOLDER, help="folder of the model")
    parser.add_argument("--tasks", type=names, default=tasks, help=",".join([*TASKS, *TEXT_TASKS]))
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt, about")
    parser.add_argument("--count", type=int, default=8, help="prompts of each task")
    parser.add_argument("--quota", type=float, default=0.25, help="share of --length, 0 to 1")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality_heads.json"))
    options = parser.parse_args()
    if unknown := sorted(set(options.tasks) - {*TASKS, *TEXT_TASKS}):
        known = ", ".join([*TASKS, *TEXT_TASKS])
        parser.error(f"unknown {', '.join(unknown)}; choose from {known}")
    return options


def main() -> None:
    options = parse_arguments()
    prepare_environment()
    report = run(options)
    options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    heads_plot.draw(report, options.out.with_suffix(".png"))
    print("Share of dynamic heads behind the prefill, class changes per chunk:\n")
    print(table(report))


if __name__ == "__main__":
    main()
