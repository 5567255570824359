"""What the heads of the pretrained model do, and what a policy keeps of what they will read.

    python -m benchmarks.real.instruments [--length 2048] [--count 4] [--quota-share 0.1 0.2]

Each prompt runs on the full cache with its right answer behind it. So for every head there are the
true queries of the question and of every token of the answer, and all keys. From them:

- concentration S of the question's queries (design: top-k mass with the sinks out, the least of the
  query heads of a KV head), and of the answer's;
- overlap: of the tokens that a step of the answer reads most, how many the step before read most;
- far: attention of the answer's steps beyond sinks and recent window;
- missing: attention of the answer's steps on tokens that a policy has dropped behind the prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.quality.provenance import REPOSITORY, current_commit, machine
from benchmarks.real import weights, worker
from benchmarks.real.plan import Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.quality.inside import Prefill
    from benchmarks.real.tasks import Example

RESULTS = REPOSITORY / "benchmarks" / "results"
QUESTION_TOKENS = 32
SINK_TOKENS, WINDOW_TOKENS = 4, 64
MOST_READ_TOKENS = 8
TASKS = ("single", "multikey", "multivalue", "passages")


@dataclass(frozen=True)
class Reading:
    """Attention of one example's answer. L layers, H KV heads, a steps of the answer.

    Attributes:
        attention: float32 [L, H, a, n], mean over the query heads of a KV head; n tokens of prompt
            and answer.
        prompt_tokens: n without the answer.
        concentration: float32 [L, H], S of the last queries of the prompt.
        answer_concentration: the same of the answer's queries.
    """

    attention: torch.Tensor
    prompt_tokens: int
    concentration: torch.Tensor
    answer_concentration: torch.Tensor

    def overlap(self) -> torch.Tensor:
        """Share of the most read prompt tokens that the step before read most too, [L, H]."""
        far = self.attention[..., SINK_TOKENS : self.prompt_tokens - WINDOW_TOKENS]
        best = far.topk(MOST_READ_TOKENS, dim=-1).indices
        read = torch.zeros(far.shape, dtype=torch.bool).scatter_(-1, best, value=True)
        both = (read[:, :, 1:] & read[:, :, :-1]).sum(dim=-1)
        return both.float().mean(dim=-1) / MOST_READ_TOKENS

    def far(self) -> torch.Tensor:
        """Attention beyond sinks and recent window, [L, H]."""
        far = self.attention[..., SINK_TOKENS : self.prompt_tokens - WINDOW_TOKENS]
        return far.sum(dim=-1).mean(dim=-1)

    def missing(self, kept: torch.Tensor) -> torch.Tensor:
        """Attention on prompt tokens that are not kept (bool [L, H, prompt]), [L, H]."""
        prompt = self.attention[..., : self.prompt_tokens]
        return (prompt * ~kept[:, :, None]).sum(dim=-1).mean(dim=-1)


def read(prefill: Prefill, prompt_tokens: int) -> Reading:
    """Attention of the recorded queries: the question's, then the answer's."""
    assert prefill.keys is not None
    num_layers, num_rows, num_query_heads, head_size = prefill.queries.shape
    num_heads, num_tokens = prefill.keys.shape[1:3]
    queries = prefill.queries.transpose(1, 2).float()
    keys = prefill.keys.float().repeat_interleave(num_query_heads // num_heads, dim=1)
    logits = queries @ keys.transpose(-1, -2) * head_size**-0.5
    positions = torch.tensor(prefill.positions)
    hidden = torch.arange(num_tokens) > positions[:, None]
    attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    asked = positions < prompt_tokens - 1
    grouped = attention.unflatten(1, (num_heads, -1))
    return Reading(
        attention=grouped[:, :, :, ~asked].mean(dim=2),
        prompt_tokens=prompt_tokens,
        concentration=concentration(grouped[:, :, :, asked], prompt_tokens),
        answer_concentration=concentration(grouped[:, :, :, ~asked], prompt_tokens),
    )


def concentration(attention: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """S: top-k mass without the sinks, mean over the rows, least of the group; [L, H]."""
    count = max(64, int(np.ceil(0.1 * num_tokens)))
    rest = attention[..., SINK_TOKENS:]
    rest = rest / rest.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    return rest.topk(count, dim=-1).values.sum(dim=-1).mean(dim=-1).amin(dim=-1)


def readings(model: str, examples: Sequence[Example]) -> list[Reading]:
    """One for each example, on the full cache."""
    from benchmarks.quality.inside import PrefillRecorder
    from benchmarks.real.lab import Setup, TextLab

    setup = Setup(model=model, budget={"policy": "full"}, engine=worker.ENGINE)
    with TextLab(setup) as lab:
        found = []
        for example in examples:
            answer_tokens = lab.count_tokens(example.told)
            rows = QUESTION_TOKENS + answer_tokens
            recorder = PrefillRecorder(
                lab,
                lambda spans, rows=rows: list(
                    range(spans.prompt_tokens - rows, spans.prompt_tokens)
                ),
                takes_cache=True,
            )
            with recorder:
                lab.read_through(example)
            (prefill,) = recorder.prefills()
            assert prefill.keys is not None
            found.append(read(prefill, prefill.keys.shape[2] - answer_tokens))
    return found


def kept_positions(model: str, run: Run, examples: Sequence[Example]) -> list[torch.Tensor]:
    """bool [L, H, prompt] of each example: what a policy holds behind the prefill."""
    from benchmarks.quality.inside import KeptRecorder
    from benchmarks.real.lab import Setup, TextLab

    setup = Setup(model=model, budget=run.budget(), engine=worker.ENGINE)
    with TextLab(setup) as lab, KeptRecorder(lab) as recorder:
        lab.ask(examples)
        # a task with answers in any order is asked twice: the first time comes first
        return recorder.kept()[: len(examples)]
