"""What the heads of the pretrained model do, and what a policy keeps of what they will read.

    python -m benchmarks.real.instruments [--length 2048] [--count 2] [--quota-share 0.2]

Each prompt runs on the full cache with its right answer behind it. So for every head there are the
true queries of the question and of every token of the answer, and all keys. From them:

- concentration S of the question's queries (design: top-k mass with the sinks out, the least of the
  query heads of a KV head), and of the answer's;
- overlap: of the tokens that a step of the answer reads most, how many the step before read most;
- far: attention of the answer's steps beyond sinks and recent window;
- missing: attention of the answer's steps on tokens that a policy has dropped behind the prefill.
  `hybrid, true question` chooses with the question's queries of the full cache in place of the
  look-ahead's: the difference is what queries without context cost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.quality.provenance import REPOSITORY, current_commit, machine
from benchmarks.real import head_report, weights, worker
from benchmarks.real.plan import METHODS
from benchmarks.real.tasks import SUITE, make_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.quality.inside import Prefill
    from benchmarks.real.plan import Run
    from benchmarks.real.tasks import Example
    from vllm_budgetkv.cache.probe.bank import ProbeBank

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
        bank: the question's queries as a look-ahead would leave them.
    """

    attention: torch.Tensor
    prompt_tokens: int
    concentration: torch.Tensor
    answer_concentration: torch.Tensor
    bank: ProbeBank

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
    from benchmarks.quality.oracle import bank_of

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
        bank=bank_of(_first_rows(prefill, int(asked.sum())), QUESTION_TOKENS),
    )


def _first_rows(prefill: Prefill, count: int) -> Prefill:
    return replace(
        prefill,
        positions=prefill.positions[:count],
        rotary_positions=prefill.rotary_positions[:count],
        queries=prefill.queries[:, :count],
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
    found = []
    with TextLab(setup) as lab:
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
    worker.free_memory()
    return found


def kept_positions(
    model: str, run: Run, examples: Sequence[Example], banks: Sequence[ProbeBank] | None = None
) -> list[torch.Tensor]:
    """bool [L, H, prompt] of each example: what a policy holds behind the prefill.

    Args:
        model: folder that vLLM can load.
        run: policy, quota and options.
        examples: each is asked once.
        banks: queries that stand in for those of a look-ahead, one for each example.
    """
    from benchmarks.quality.inside import KeptRecorder, before_admission
    from benchmarks.quality.oracle import seeding
    from benchmarks.real.lab import Setup, TextLab

    budget = run.budget() if banks is None else run.budget() | {"lookahead": False}
    with ExitStack() as stack:
        lab = stack.enter_context(TextLab(Setup(model=model, budget=budget, engine=worker.ENGINE)))
        if banks is not None:
            stack.enter_context(before_admission(lab, seeding(lab, banks)))
        recorder = stack.enter_context(KeptRecorder(lab))
        lab.force(examples)
        kept = recorder.kept()
    worker.free_memory()
    return kept


def by_task(
    examples: Sequence[Example], values: Sequence[torch.Tensor]
) -> dict[str, list[list[float]]]:
    """Mean over the examples of each task, [L, H]."""
    tasks = dict.fromkeys(example.task for example in examples)
    return {
        task: torch.stack([v for e, v in zip(examples, values, strict=True) if e.task == task])
        .mean(dim=0)
        .numpy()
        .round(3)
        .tolist()
        for task in tasks
    }


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, by name, task, layer and head."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = [
        example
        for task in TASKS
        for example in make_examples(task, options.length, options.count, tokenizer)
    ]
    found = readings(model, examples)
    result: dict[str, Any] = {
        "concentration": by_task(examples, [r.concentration for r in found]),
        "answer_concentration": by_task(examples, [r.answer_concentration for r in found]),
        "overlap": by_task(examples, [r.overlap() for r in found]),
        "far": by_task(examples, [r.far() for r in found]),
        "missing": {},
    }
    for share in options.quota_share:
        for method in METHODS:
            if method.name not in options.policy:
                continue
            run = replace(method, quota_share=share, length_tokens=options.length)
            probes = {method.name: None}
            if method.name == "hybrid":
                probes["hybrid, true question"] = [reading.bank for reading in found]
            for name, banks in probes.items():
                kept = kept_positions(model, run, examples, banks)
                missing = [r.missing(k) for r, k in zip(found, kept, strict=True)]
                result["missing"][f"{name} at {share:g}"] = by_task(examples, missing)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="What the heads of the pretrained model do.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=2, help="examples of each task")
    parser.add_argument("--quota-share", type=float, nargs="+", default=[0.2])
    parser.add_argument("--policy", nargs="+", default=["hybrid", "snapkv", "keydiff"])
    options = parser.parse_args()
    os.environ |= worker.ENVIRONMENT
    about = {
        "command": " ".join(["python -m benchmarks.real.instruments", *sys.argv[1:]]),
        "commit": current_commit(),
        "machine": machine(),
        "model": weights.LABEL,
        "suite_seed": SUITE,
    }
    result = {"about": about} | measure(str(weights.model_folder()), options)
    file = RESULTS / "real_heads.json"
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(head_report.table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
