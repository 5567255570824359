"""What a rule would answer, without an engine and without a kernel: minutes instead of hours.

    python -m benchmarks.real.simulation [--length 2048] [--count 3] [--quota-share 0.1] [--rule ..]

Prompts are read once, on the full cache; then every rule says which tokens each step of the right
answer may read, and the model says how likely the answer was. Policies are the engine's own code.
What differs from the engine: keys were computed behind the whole prompt, and no page is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.provenance import REPOSITORY
from benchmarks.real import head_report, weights, worker
from benchmarks.real.attention import attention, concentration
from benchmarks.real.chosen import keep, record
from benchmarks.real.origin import origin
from benchmarks.real.plan import CHUNK_TOKENS, DECODE_INTERVAL_TOKENS, PAGE_TOKENS
from benchmarks.real.recalled import Reader, Recall
from benchmarks.real.sketch import Sketch
from benchmarks.real.tasks import TASKS, make_examples
from benchmarks.real.told import ToldModel
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.policy import PolicyOptions, make_policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.real.chosen import Probe, Recorded

FILE = REPOSITORY / "benchmarks" / "results" / "real_simulation.json"
SIMULATED = ("single", "reversed", "distant")


@dataclass(frozen=True)
class Rule:
    """A policy, its options, and what comes back.

    Args:
        policy: a key of `POLICIES`.
        options: fields of `PolicyOptions`.
        recall: None brings nothing back.
        source: of the probe.
    """

    policy: str = "hybrid"
    options: Mapping[str, Any] = field(default_factory=dict)
    recall: Recall | None = None
    source: Probe = "ahead"


SHARP = Recall(heads_share=1 / 3)
# the engine's index, and what it could be
INDEX = Sketch(bits=4, share=0.25)


def exactly(recall: Recall, tokens: int, candidates: int) -> Rule:
    """Recall by entries of so many tokens, of which exact keys choose among so many times C."""
    return Rule(recall=replace(recall, sketch=replace(INDEX, tokens=tokens, candidates=candidates)))


RULES: dict[str, Rule] = {
    "hybrid": Rule(),
    "hybrid, question asked behind each chunk": Rule(source="replay"),
    "hybrid, true question": Rule(source="true"),
    "keydiff": Rule("keydiff"),
    "all recall, exact": Rule(recall=Recall()),
    "all recall, 2 bits": Rule(recall=Recall(bits=2)),
    "sharp third, exact": Rule(recall=SHARP),
    "sharp third, 2 bits": Rule(recall=replace(SHARP, bits=2)),
    "sharp third, 1 bit": Rule(recall=replace(SHARP, bits=1)),
    "sharp third, 2 bits, window only": Rule("window", recall=replace(SHARP, bits=2)),
    "all recall, index": Rule(recall=Recall(sketch=INDEX)),
    "sharp third, index": Rule(recall=replace(SHARP, sketch=INDEX)),
    "all recall, index, exact keys of twice as many": exactly(Recall(), 1, 2),
    "sharp third, index, exact keys of twice as many": exactly(SHARP, 1, 2),
    "sharp third, index of 2 tokens": exactly(SHARP, 2, 1),
    "sharp third, index of 2 tokens, exact keys of twice as many": exactly(SHARP, 2, 2),
    "sharp third, index of 4 tokens, exact keys of four times as many": exactly(SHARP, 4, 4),
    "sharp tenth, 2 bits": Rule(recall=replace(SHARP, heads_share=0.1, bits=2)),
    "broad third, exact": Rule(recall=replace(SHARP, pick="broad")),
    "random third, exact": Rule(recall=replace(SHARP, pick="random")),
}


def question_concentration(recorded: Recorded) -> torch.Tensor:
    """S of the question's queries on the full cache, float32 [L, H]."""
    past = recorded.past
    positions = torch.arange(past.num_tokens)[-recorded.num_rows :]
    pairs = zip(recorded.question_queries, past.keys, strict=True)
    return torch.stack([concentration(attention(q, k, positions)) for q, k in pairs])


def judge(model: ToldModel, recorded: Recorded, reader: Reader) -> tuple[bool, float]:
    """Whether the right answer is what greedy decoding writes, and its log-probability a token."""
    past = recorded.past.first(len(recorded.prompt) - 1)
    logits = model.answer(past, [recorded.prompt[-1], *recorded.told[:-1]], reader)
    told = torch.tensor(recorded.told)
    logprobs = logits.log_softmax(dim=-1)[torch.arange(len(told)), told]
    return bool((logits.argmax(dim=-1) == told).all()), float(logprobs.mean())


def quota_of(recorded: Recorded, share: float) -> Quota:
    """The engine's, for a share of the prompt."""
    return Quota(
        blocks=int(share * len(recorded.prompt)) // PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        num_layers=len(recorded.memory.keys),
        chunk_tokens=CHUNK_TOKENS,
        decode_interval_tokens=DECODE_INTERVAL_TOKENS,
    )


def reader_of(recorded: Recorded, rule: Rule, share: float) -> Reader:
    """What stays under a quota, and what may come back.

    Raises:
        ValueError: nothing is left of the quota beside index and recalled tokens.
    """
    past, quota = recorded.past, quota_of(recorded, share)
    options = PolicyOptions(**rule.options)
    policy = make_policy(rule.policy, options, PAGE_TOKENS)
    if rule.recall is None:
        kept = keep(recorded, policy, options, quota, quota.budget_tokens, rule.source)
        return Reader(kept, past)
    recall = rule.recall
    rest_tokens = quota.budget_tokens - recall.index_tokens(len(recorded.prompt))
    back_tokens, own_tokens, others_tokens = recall.split(rest_tokens)
    if own_tokens < 1:
        raise ValueError(f"{quota.budget_tokens} tokens leave {own_tokens} beside the index")
    kept = keep(recorded, policy, options, quota, own_tokens, rule.source)
    heads = recall.heads(question_concentration(recorded))
    if others_tokens not in (0, own_tokens):
        others = keep(recorded, policy, options, quota, others_tokens, rule.source)
        kept = torch.where(heads[..., None], kept, others)
    return Reader(kept, past, recall, back_tokens, heads, energy_of(recorded))


def energy_of(recorded: Recorded) -> torch.Tensor:
    """float32 [L, H, D]: mean square of the question's queries."""
    num_heads = recorded.past.keys[0].shape[0]
    grouped = [q.unflatten(0, (num_heads, -1)) for q in recorded.question_queries]
    return torch.stack([q.square().mean(dim=(1, 2)) for q in grouped])


def recorded(
    model: ToldModel, folder: str, tasks: Sequence[str], options: argparse.Namespace
) -> Iterator[Recorded]:
    """`options.count` prompts of `options.length` tokens of each task, read one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task in tasks:
        for example in make_examples(task, options.length, options.count, tokenizer):
            prompt, told = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (example.prompt(tokenizer), example.told)
            )
            yield record(model, task, prompt, told, PolicyOptions().probe_tokens)


def measure(model_folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """By rule and quota: (right, log-probability) of every example of each task."""
    model = ToldModel(model_folder)
    outcomes: dict[str, dict[str, list[tuple[bool, float]]]] = {}
    for one in recorded(model, model_folder, options.task, options):
        readers = {"full cache": Reader(everything(one), one.past)}
        for name in options.rule:
            for share in options.quota_share:
                readers[f"{name} at {share:g}"] = reader_of(one, RULES[name], share)
        for title, reader in readers.items():
            outcome = judge(model, one, reader)
            outcomes.setdefault(title, {}).setdefault(one.task, []).append(outcome)
        print(one.task, len(outcomes["full cache"][one.task]), flush=True)
    return outcomes


def everything(one: Recorded) -> torch.Tensor:
    """bool [L, H, n], all of them True."""
    keys = one.past.keys
    return torch.ones(len(keys), *keys[0].shape[:2], dtype=torch.bool)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a rule would answer.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=3, help="examples of each task")
    parser.add_argument("--quota-share", type=float, nargs="+", default=[0.1])
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(SIMULATED))
    parser.add_argument("--rule", nargs="+", choices=list(RULES), default=list(RULES))
    options = parser.parse_args()
    os.environ |= worker.ENVIRONMENT
    about = origin("simulation")
    result = {"about": about, "outcomes": measure(str(weights.model_folder()), options)}
    FILE.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(head_report.rule_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
