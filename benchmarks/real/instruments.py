"""What the heads of the pretrained model do, and what a policy keeps of what they will read.

    python -m benchmarks.real.instruments [--length 2048] [--count 2] [--quota-share 0.1 0.2]

Each prompt is read once on the full cache with its right answer behind it, so for every head there
are all keys and the true queries of the question and of every step of the answer. From them:

- concentration S of the question's queries and of the answer's; how far a look-ahead, asked behind
  every chunk, is from the question's S, and how many heads change their class from chunk to chunk;
- overlap: of the tokens that a step of the answer reads most, how many the step before read most;
- afar: attention of the answer's steps beyond sinks and recent window;
- missing: attention of the answer's steps on tokens that a policy has dropped, with the probe of
  a look-ahead, with the question asked again behind every chunk in context ("replay"), and with
  the question's own queries ("true"); and what is still missing when a third of the heads recalls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.provenance import REPOSITORY
from benchmarks.real import head_report, weights, worker
from benchmarks.real.attention import OPTIONS, attention, concentration
from benchmarks.real.chosen import keep
from benchmarks.real.origin import origin
from benchmarks.real.plan import CHUNK_TOKENS, PAGE_TOKENS
from benchmarks.real.simulation import RULES, question_concentration, quota_of, reader_of, recorded
from benchmarks.real.told import ToldModel
from vllm_budgetkv.policy import make_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.real.chosen import Probe, Recorded

FILE = REPOSITORY / "benchmarks" / "results" / "real_heads.json"
MOST_READ_TOKENS = 8
TASKS = ("single", "multikey", "reversed", "distant", "multivalue", "passages")
KEEPERS: dict[str, tuple[str, Probe]] = {
    "hybrid, look-ahead": ("hybrid", "ahead"),
    "hybrid, replay": ("hybrid", "replay"),
    "hybrid, true": ("hybrid", "true"),
    "snapkv": ("snapkv", "ahead"),
    "keydiff": ("keydiff", "ahead"),
}
RECALLING = "sharp third, 2 bits"


def of_layers(of_layer: Callable[[int], torch.Tensor], num_layers: int) -> torch.Tensor:
    return torch.stack([of_layer(layer) for layer in range(num_layers)])


def answer_attention(one: Recorded) -> torch.Tensor:
    """float32 [L, H, a, n + a - 1]: mean over the query heads of a KV head."""
    steps = torch.arange(len(one.told)) + len(one.prompt) - 1
    return of_layers(
        lambda i: attention(one.answer_queries[i], one.memory.keys[i], steps).mean(dim=1),
        len(one.memory.keys),
    )


def answer_concentration(one: Recorded) -> torch.Tensor:
    """S of the answer's queries, [L, H]."""
    steps = torch.arange(len(one.told)) + len(one.prompt) - 1
    return of_layers(
        lambda i: concentration(attention(one.answer_queries[i], one.memory.keys[i], steps)),
        len(one.memory.keys),
    )


def chunk_concentration(one: Recorded) -> torch.Tensor:
    """S of a look-ahead behind every chunk, in full, [chunks, L, H]."""
    found = []
    for stop in range(CHUNK_TOKENS, len(one.prompt), CHUNK_TOKENS):
        probe, past = one.probe(stop, "ahead").transpose(1, 2), one.past.first(stop)
        position = torch.full((one.num_rows,), stop)
        found.append(
            of_layers(
                lambda i, probe=probe, past=past, position=position: concentration(
                    attention(probe[i], past.keys[i], position)
                ),
                len(past.keys),
            )
        )
    return torch.stack(found)


def overlap(read: torch.Tensor) -> torch.Tensor:
    """Share of the most read tokens that the step before read most too, [L, H].

    Args:
        read: [L, H, a, n], without sinks and recent window.
    """
    best = read.topk(MOST_READ_TOKENS, dim=-1).indices
    most = torch.zeros(read.shape, dtype=torch.bool).scatter_(-1, best, value=True)
    both = (most[:, :, 1:] & most[:, :, :-1]).sum(dim=-1)
    return both.float().mean(dim=-1) / MOST_READ_TOKENS


def missing(read: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    """Attention of the answer's steps on what they may not read, [L, H]."""
    return (read * ~readable).sum(dim=-1).mean(dim=-1)


def heads(one: Recorded, shares: list[float]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every figure of one example by its name, [L, H]."""
    read = answer_attention(one)
    prompt = read[..., : len(one.prompt)]
    far = prompt[..., OPTIONS.sink_tokens : len(one.prompt) - OPTIONS.window_tokens]
    question, chunks = question_concentration(one), chunk_concentration(one)
    static = chunks >= OPTIONS.static_threshold
    yield "S of the question", question
    yield "S of the answer", answer_concentration(one)
    yield "look-ahead's S, off by", (chunks[-1] - question).abs()
    yield "class changes a chunk", (static[1:] != static[:-1]).float().mean(dim=0)
    if len(one.told) > 1:
        yield "overlap of steps", overlap(far)
    yield "attention afar", far.sum(dim=-1).mean(dim=-1)
    for share in shares:
        quota = quota_of(one, share)
        for name, (policy, source) in KEEPERS.items():
            chooser = make_policy(policy, OPTIONS, PAGE_TOKENS)
            kept = keep(one, chooser, OPTIONS, quota, quota.budget_tokens, source)
            yield f"missing at {share:g}: {name}", missing(prompt, kept[:, :, None])
        reader = reader_of(one, RULES[RECALLING], share)
        readable = of_layers(
            lambda i, reader=reader: reader(i, one.answer_queries[i], one.past.keys[i]),
            len(one.memory.keys),
        )
        yield f"missing at {share:g}: {RECALLING} recalls", missing(prompt, readable)


def measure(model_folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """By figure and task, mean over the examples: a list per layer with a number per KV head."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for one in recorded(ToldModel(model_folder), model_folder, TASKS, options):
        for name, values in heads(one, options.quota_share):
            found.setdefault(name, {}).setdefault(one.task, []).append(values)
        print(one.task, flush=True)
    return {
        name: {
            task: torch.stack(values).mean(dim=0).numpy().round(3).tolist()
            for task, values in tasks.items()
        }
        for name, tasks in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What the heads of the pretrained model do.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=2, help="examples of each task")
    parser.add_argument("--quota-share", type=float, nargs="+", default=[0.1, 0.2])
    options = parser.parse_args()
    os.environ |= worker.ENVIRONMENT
    about = origin("instruments")
    result = {"about": about, "figures": measure(str(weights.model_folder()), options)}
    FILE.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(head_report.table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
