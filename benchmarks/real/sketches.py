"""How much of a key an index must know, so that a head finds what it looks for: no engine needed.

    python -m benchmarks.real.sketches [--length 2048] [--count 1] [--task ...]

For the sharp third of the heads and the queries that write the right answer: of the attention that
the best tokens have, sinks and window aside, how much have those that a sketch of the keys finds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

import torch

from benchmarks.bench_table import replace as replace_block
from benchmarks.quality.provenance import REPOSITORY
from benchmarks.quality.report import grid
from benchmarks.real import weights, worker
from benchmarks.real.origin import origin
from benchmarks.real.simulation import SIMULATED, question_concentration, recorded
from benchmarks.real.sketch import Sketch
from benchmarks.real.tasks import TASKS
from benchmarks.real.told import ToldModel

if TYPE_CHECKING:
    from typing import Any

    from benchmarks.real.chosen import Recorded

FILE = REPOSITORY / "benchmarks" / "results" / "real_sketches.json"
DOCUMENT = REPOSITORY / "docs" / "experiments.md"
SINK_TOKENS, WINDOW_TOKENS = 4, 64
FOUND_TOKENS = 48

SKETCHES = (
    Sketch(bits=1),
    Sketch(bits=2),
    Sketch(bits=3),
    Sketch(bits=4),
    Sketch(bits=4, share=0.5),
    Sketch(bits=4, share=0.5, asks=False),
    Sketch(bits=2, share=0.5),
    Sketch(bits=4, share=0.25),
    Sketch(bits=4, share=0.25, candidates=2),
    Sketch(bits=2, candidates=4),
    Sketch(bits=4, share=0.125),
    *(
        Sketch(bits=4, share=0.25, tokens=tokens, candidates=candidates)
        for tokens in (2, 4, 8)
        for candidates in (1, 2, 4)
    ),
)


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float32 [a, n]: attention of each step, summed over the group; sinks and window have none."""
    logits = torch.einsum("gad,nd->gan", queries, keys) * keys.shape[-1] ** -0.5
    mass = logits.softmax(dim=-1).sum(dim=0)
    mass[:, :SINK_TOKENS] = 0.0
    mass[:, -WINDOW_TOKENS:] = 0.0
    return mass


def captured(one: Recorded, layer: int, head: int) -> dict[str, torch.Tensor]:
    """By sketch, the share [a] of the best tokens' attention that its tokens have."""
    keys, num_heads = one.past.keys[layer][head], one.past.keys[layer].shape[0]
    answer, question = (
        queries[layer].unflatten(0, (num_heads, -1))[head]
        for queries in (one.answer_queries, one.question_queries)
    )
    energy, mass = question.square().mean(dim=(0, 1)), attention(answer, keys)
    best = mass.topk(FOUND_TOKENS).values.sum(dim=-1)
    found = {}
    for sketch in SKETCHES:
        seen = attention(answer, sketch.of(keys, energy))
        candidates = seen.topk(sketch.candidates * FOUND_TOKENS).indices
        taken = mass.gather(1, candidates).topk(FOUND_TOKENS).values
        if sketch.candidates == 1:
            taken = mass.gather(1, candidates)
        found[sketch.title()] = taken.sum(dim=-1) / best.clamp(min=1e-9)
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per sketch: bits a token of D channels, captured share, its mean and lowest tenth."""
    folder = str(weights.model_folder())
    model = ToldModel(folder)
    shares: dict[str, list[torch.Tensor]] = {}
    for one in recorded(model, folder, options.task, options):
        concentration = question_concentration(one)
        count = round(concentration.numel() / 3)
        for index in concentration.flatten().topk(count).indices.tolist():
            layer, head = divmod(index, concentration.shape[1])
            for title, share in captured(one, layer, head).items():
                shares.setdefault(title, []).append(share)
    rows = []
    for sketch in SKETCHES:
        share = torch.cat(shares[sketch.title()])
        rows.append(
            {
                "sketch": sketch.title(),
                "bits_per_channel": sketch.channel_bits,
                "mean": round(float(share.mean()), 3),
                "lowest_tenth": round(float(share.quantile(0.1)), 3),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown of the rows."""
    heads = ["an index of", "bits a channel of the key", "found, mean", "found, lowest tenth"]
    rows = [
        [
            row["sketch"],
            f"{row['bits_per_channel']:g}",
            f"{row['mean']:.2f}",
            f"{row['lowest_tenth']:.2f}",
        ]
        for row in result["rows"]
    ]
    about = result["about"]
    source = f"`{about['command']}` at {about['commit']}, {about['machine']}; {weights.LABEL}."
    return "\n".join([*grid(heads, rows), "", source])


def main() -> int:
    parser = argparse.ArgumentParser(description="What an index must know of a key.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=1, help="examples of each task")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(SIMULATED))
    options = parser.parse_args()
    os.environ |= worker.ENVIRONMENT
    result = {"about": origin("sketches"), "rows": measure(options)}
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    replace_block(DOCUMENT, "real_sketches", table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
