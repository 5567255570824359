"""Asks a real engine the tasks: what it writes, and how likely the right answer was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.real.forced import KEY, ForcedAnswer
from benchmarks.real.tasks import holds_all
from vllm_budgetkv.start.config import budget_args

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from vllm import RequestOutput, SamplingParams

    from benchmarks.real.tasks import Example

SPARE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One engine.

    Args:
        model: folder that vLLM can load.
        budget: options of the plugin, see `BudgetConfig`; none runs stock vLLM.
        page_tokens: tokens of a block.
        max_model_len: longest prompt and answer.
        cache_dtype: how keys and values are stored, vLLM's `kv_cache_dtype`.
        dtype: that the engine computes in.
        engine: further arguments of `LLM`.
    """

    model: str
    budget: dict[str, Any] = field(default_factory=dict)
    page_tokens: int = 16
    max_model_len: int = 8192
    cache_dtype: str = "auto"
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one example came to.

    Attributes:
        right: whether the greedy answer holds all that was asked for, in any order.
        first: whether the first token of the right answer was the likeliest.
        exact: whether every token of it was, behind the right ones before it.
        logprob: natural logarithm of the probability of the right answer, per token.
        text: what was written freely; None where the answer has one order only.
        record: the plugin's report of the request; empty for stock vLLM.
    """

    task: str
    depth: float | None
    right: bool
    first: bool
    exact: bool
    logprob: float
    text: str | None
    prompt_tokens: int
    record: dict[str, Any]


class TextLab:
    """An engine in this process, kept for many examples; ends with its `with` block."""

    def __init__(self, setup: Setup) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        self._folder = tempfile.TemporaryDirectory(prefix="budgetkv-real-")
        self._report = Path(self._folder.name) / "requests.jsonl"
        self._report.touch()
        arguments: dict[str, Any] = {
            "model": setup.model,
            "dtype": setup.dtype,
            "kv_cache_dtype": setup.cache_dtype,
            "enforce_eager": True,
            "max_model_len": setup.max_model_len,
            "block_size": setup.page_tokens,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "logits_processors": [ForcedAnswer],
        }
        if setup.budget:
            arguments |= budget_args(**setup.budget, report_file=str(self._report))
        self.llm = LLM(**arguments | setup.engine)
        self._tokenizer = AutoTokenizer.from_pretrained(setup.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def ask(self, examples: Sequence[Example]) -> list[Outcome]:
        """Make every example write its right answer, and ask freely where the order is free.

        Greedy decoding writes the one right answer exactly where each of its tokens is the
        likeliest behind those before it, so an example with one answer need not be asked twice.
        """
        forced = self.force(examples)
        several = [example for example in examples if len(example.answers) > 1]
        limits = [_free(len(self._tokens(example.told))) for example in several]
        answers = dict(zip(several, self._generate(several, limits), strict=True))
        records = self._records()
        outcomes = []
        for example, judged in zip(examples, forced, strict=True):
            ranks, logprobs = _judge(judged)
            exact = all(rank == 1 for rank in ranks)
            text = answers[example].outputs[0].text if example in answers else None
            outcomes.append(
                Outcome(
                    task=example.task,
                    depth=example.depth,
                    right=exact if text is None else holds_all(text, example.answers),
                    first=ranks[0] == 1,
                    exact=exact,
                    logprob=sum(logprobs) / len(logprobs),
                    text=text,
                    prompt_tokens=len(judged.prompt_token_ids or ()),
                    record=records.get(judged.request_id, {}),
                )
            )
        return outcomes

    def force(self, examples: Sequence[Example]) -> list[RequestOutput]:
        """Make every example write its right answer."""
        return self._generate(examples, [_forced(self._tokens(e.told)) for e in examples])

    def count_tokens(self, text: str) -> int:
        return len(self._tokens(text))

    def read_through(self, example: Example) -> None:
        """Run the prompt with its right answer behind it, and write one token."""
        prompt = example.inputs(self._tokenizer, behind=example.told)
        self.llm.generate([prompt], _free(1), use_tqdm=False)

    def _generate(
        self, examples: Sequence[Example], params: list[SamplingParams]
    ) -> list[RequestOutput]:
        if not examples:
            return []
        prompts = [example.inputs(self._tokenizer) for example in examples]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        # the worker reports what ended in the last step when the next one starts
        self.llm.llm_engine.step()
        return outputs

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _records(self) -> dict[str, dict[str, Any]]:
        """Records of the requests that ended, by the id that the engine was given."""
        records = [json.loads(line) for line in self._report.read_text().splitlines()]
        # the engine appends a suffix of its own to the id
        return {record["request_id"].rsplit("-", 1)[0]: record for record in records}


def _free(answer_tokens: int) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=answer_tokens + SPARE_TOKENS)


def _forced(tokens: list[int]) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=len(tokens), logprobs=0, extra_args={KEY: tokens}
    )


def _judge(output: RequestOutput) -> tuple[list[int], list[float]]:
    """(rank, 1 for the likeliest, and log-probability) of every token that was written."""
    steps = output.outputs[0].logprobs
    assert steps is not None
    found = [step[token] for step, token in zip(steps, output.outputs[0].token_ids, strict=True)]
    return [int(entry.rank or 0) for entry in found], [entry.logprob for entry in found]
