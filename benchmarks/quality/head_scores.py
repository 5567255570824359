"""Offline head scores for the policy `sparsemm`: `python -m benchmarks.quality.head_scores`.

SparseMM (arXiv 2506.05344) runs pictures with text in known boxes through the model. Where the
token to which a head attends most lies in the box that the answer was read from, the head gets one
point divided by the tokens of the box. Here the pictures are needles of the suite at a length that
no report uses, the box is the cell with the sign, and a KV head has the points of its query heads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.quality import reader, scenes
from benchmarks.quality.inside import PrefillRecorder, cache_of, closing, prepare_environment
from benchmarks.quality.plan import HEAD_SCORES
from benchmarks.quality.suite import make_examples

if TYPE_CHECKING:
    from benchmarks.quality.inside import Prefill
    from benchmarks.quality.suite import Example

LENGTH_TOKENS = 700
GENERATION_TOKENS = 5
"""Tokens of "<|im_end|>\\n<|im_start|>assistant\\n" in the lab's model."""
TASKS = ("needle", "detail", "whole")


def main() -> int:
    parser = argparse.ArgumentParser(description="Offline head scores for the policy sparsemm.")
    parser.add_argument("--model", default=str(reader.FOLDER))
    parser.add_argument("--count", type=int, default=40, help="examples of each task")
    parser.add_argument("--out", type=Path, default=HEAD_SCORES)
    options = parser.parse_args()
    scores = measure(options.model, options.count)
    options.out.write_text(json.dumps(scores) + "\n", encoding="utf-8")
    print(f"wrote {options.out}: {scores}")
    return 0


def measure(model: str, count: int) -> list[list[float]]:
    """Mean points of every KV head, [L][H]."""
    prepare_environment()
    from benchmarks.quality.lab import Lab, Setup

    lab = Lab(Setup(model=model, budget={"policy": "full"}))
    examples = [e for task in TASKS for e in make_examples(task, LENGTH_TOKENS, count)]
    with closing(lab):
        scale = cache_of(lab).layers.reader.scales[0]
        recorder = PrefillRecorder(lab, lambda spans: [spans.prompt_tokens - 1], takes_cache=True)
        with recorder:
            outcomes = lab.ask(examples)
        points = [
            points_of(prefill, evidence_positions(example, prefill), scale)
            for example, prefill, outcome in zip(
                examples, recorder.prefills(), outcomes, strict=True
            )
            if outcome.right
        ]
    if not points:
        raise RuntimeError(f"{model} answers none of {len(examples)} examples; train it first")
    return torch.stack(points).mean(dim=0).tolist()


def points_of(prefill: Prefill, evidence: torch.Tensor, scale: float) -> torch.Tensor:
    """Points of every KV head, float32 [L, H].

    Args:
        prefill: its last query is the one that gives the answer.
        evidence: int64, positions of the cells that show the answer.
        scale: of the logits.
    """
    assert prefill.keys is not None
    num_layers, num_heads, _, head_size = prefill.keys.shape
    queries = prefill.queries[:, -1].view(num_layers, num_heads, -1, head_size).float()
    logits = torch.einsum("lhgd,lhnd->lhgn", queries, prefill.keys.float()) * scale
    hits = torch.isin(logits.argmax(dim=-1), evidence)
    return hits.sum(dim=-1) / len(evidence)


def evidence_positions(example: Example, prefill: Prefill) -> torch.Tensor:
    """Prompt positions of the cells that show the letter that is asked for, int64."""
    (scene,) = example.talk.scenes
    letter = scenes.LETTERS.index(example.talk.turns[-1][0][0])
    cells = torch.from_numpy(scene.ravel())
    is_sign = cells < scenes.landscape_id(0)
    shows = is_sign & (cells % scenes.NUM_SIGNS // scenes.NUM_DIGITS == letter)
    # behind the video: its end marker, the question and the generation prompt
    question_tokens = 1 + len(example.talk.turns[-1][0])
    first = prefill.positions[-1] + 1 - GENERATION_TOKENS - question_tokens - len(cells)
    return first + torch.nonzero(shows)[:, 0]


if __name__ == "__main__":
    sys.exit(main())
