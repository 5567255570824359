"""Asks a real engine the examples of the suite and reads back what each request held."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.conversations import VIDEO
from benchmarks.quality.scenes import Palette
from vllm_budgetkv.start.config import budget_args
from vllm_budgetkv.testing.shapes import FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers import ProcessorMixin

    from benchmarks.quality.suite import Example

FRAMES_PER_SECOND = float(FRAMES_PER_TOKEN)
MAX_ANSWER_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One engine.

    Args:
        model: folder or name that vLLM can load.
        budget: options of the plugin, see `BudgetConfig`; none runs stock vLLM.
        page_tokens: tokens of a block.
        max_model_len: longest prompt and answer.
        cache_dtype: how keys and values are stored, vLLM's `kv_cache_dtype`.
        dtype: that the engine computes in.
        instructions: system message, for a model that does not know the notation of the tasks.
        engine: further arguments of `LLM`.
    """

    model: str
    budget: dict[str, Any] = field(default_factory=dict)
    page_tokens: int = 8
    max_model_len: int = 8192
    cache_dtype: str = "auto"
    dtype: str = "float32"
    instructions: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one example came to.

    Attributes:
        right: whether the answer is the right one, to the letter.
        text: the answer.
        record: the plugin's report of the request; empty for stock vLLM.
    """

    task: str
    length_tokens: int
    depth: float | None
    right: bool
    text: str
    prompt_tokens: int
    record: dict[str, Any]


class Lab:
    """An engine in this process, kept for many examples."""

    def __init__(self, setup: Setup) -> None:
        from transformers import AutoProcessor
        from vllm import LLM

        self.setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="budgetkv-lab-")
        self._report = Path(self._folder.name) / "requests.jsonl"
        self._report.touch()
        arguments: dict[str, Any] = {
            "model": setup.model,
            "dtype": setup.dtype,
            "kv_cache_dtype": setup.cache_dtype,
            "enforce_eager": True,
            "max_model_len": setup.max_model_len,
            "block_size": setup.page_tokens,
            "limit_mm_per_prompt": {"image": 0, "video": 128},
            "mm_processor_cache_gb": 0,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        if setup.budget:
            arguments |= budget_args(**setup.budget, report_file=str(self._report))
        self.llm = LLM(**arguments | setup.engine)
        self._processor: ProcessorMixin = AutoProcessor.from_pretrained(setup.model)
        self._palette = Palette()

    def ask(self, examples: Sequence[Example]) -> list[Outcome]:
        """Greedy answers of all examples, as many at once as the engine takes."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
        prompts = [self._prompt(example) for example in examples]
        outputs = self.llm.generate(prompts, greedy, use_tqdm=False)
        # the worker reports what ended in the last step when the next one starts
        self.llm.llm_engine.step()
        records = self._records()
        outcomes = []
        for example, output in zip(examples, outputs, strict=True):
            text = output.outputs[0].text
            outcomes.append(
                Outcome(
                    task=example.task,
                    length_tokens=example.length_tokens,
                    depth=example.depth,
                    right=same_answer(text, example.answer),
                    text=text,
                    prompt_tokens=len(output.prompt_token_ids),
                    record=records.get(output.request_id, {}),
                )
            )
        return outcomes

    def _prompt(self, example: Example) -> Any:
        """Text of the model's own chat template, and the videos as pixels."""
        talk = example.talk
        messages: list[dict[str, Any]] = []
        if self.setup.instructions:
            system = {"type": "text", "text": self.setup.instructions}
            messages.append({"role": "system", "content": [system]})
        for index, (question, answer) in enumerate(talk.turns):
            content = talk.content + question if index == 0 else question
            messages.append({"role": "user", "content": parts_of(content)})
            if index + 1 < len(talk.turns):
                messages.append(
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]}
                )
        text = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        videos = [self._video(scene) for scene in talk.scenes]
        return {"prompt": text, "multi_modal_data": {"video": videos}}

    def _video(self, scene: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        frames = self._palette.draw(scene)
        return frames, {
            "fps": FRAMES_PER_SECOND,
            "total_num_frames": len(frames),
            "frames_indices": list(range(len(frames))),
            "do_sample_frames": False,
        }

    def _records(self) -> dict[str, dict[str, Any]]:
        """Records of the requests that ended, by the id that the engine was given."""
        records = [json.loads(line) for line in self._report.read_text().splitlines()]
        # the engine appends a suffix of its own to the id
        return {record["request_id"].rsplit("-", 1)[0]: record for record in records}


def parts_of(content: str) -> list[dict[str, str]]:
    """Parts of a chat message: each `VIDEO` marker a video, the rest text."""
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(VIDEO)):
        if index:
            parts.append({"type": "video"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def same_answer(text: str, answer: str) -> bool:
    """Whether the letters and digits of two answers are the same."""
    return re.sub(r"[^A-Z0-9]", "", text.upper()) == answer
