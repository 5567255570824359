"""Offline head scores: a point where a head looks most at the cell that shows the answer."""

from __future__ import annotations

import torch

from benchmarks.quality import reader
from benchmarks.quality.batches import Collator
from benchmarks.quality.conversations import Conversation
from benchmarks.quality.head_scores import evidence_positions, points_of
from benchmarks.quality.inside import Prefill
from benchmarks.quality.suite import make_examples


def prefill_of(keys: torch.Tensor, queries: torch.Tensor) -> Prefill:
    last = keys.shape[2] - 1
    return Prefill([last], torch.tensor([last]), queries, keys, keys)


def test_points() -> None:
    """Two KV heads of two query heads: three look at token 2, which is half of the evidence."""
    keys = torch.zeros(1, 2, 4, 2)
    keys[0, :, 2, 0] = keys[0, :, 1, 1] = 1.0
    queries = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])[None]
    points = points_of(prefill_of(keys, queries), torch.tensor([2, 3]), scale=1.0)
    assert points.tolist() == [[1.0, 0.5]]


def test_evidence_is_where_the_prompt_shows_the_letter() -> None:
    vocabulary = reader.build_vocabulary()
    for task in ("needle", "detail", "whole"):
        for example in make_examples(task, 700, 3):
            talk = example.talk
            batch = Collator(vocabulary)([Conversation(talk.content, talk.scenes, talk.turns)])
            # the prompt ends before the answer, its end marker and the line break behind it
            length = batch.input_ids.shape[1] - 3
            keys = torch.zeros(1, 1, length, 2)
            found = evidence_positions(example, prefill_of(keys, torch.zeros(1, 1, 1, 2)))
            assert batch.is_vision[0, found].all()
            shown = torch.zeros(length, dtype=torch.int64)
            shown[batch.is_vision[0, :length]] = batch.cells
            assert len(found) == (16 if task == "whole" else 1)
            assert len(set((shown[found] % 230 // 10).tolist())) == 1
