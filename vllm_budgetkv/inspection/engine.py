"""A conversation in an engine of its own, which ends with it; and what vLLM reads of its media."""

from __future__ import annotations

import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vllm_budgetkv.inspection.story import read_story
from vllm_budgetkv.start.config import SECTION, section_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_budgetkv.inspection.story import Story

DEFAULT_POLICY = "hybrid"
# without the profiling of the vision tower a step's tokens are also what it may keep
MOST_BATCH_TOKENS = 32768
TRACE_WAIT_SECONDS = 30.0


def ask(
    given: EngineArgs, messages: Sequence[dict[str, Any]], max_tokens: int
) -> tuple[Story, str]:
    """Start an engine, ask it, and read the trace that it wrote.

    Args:
        given: arguments of the engine; their `additional_config` is completed.
        messages: of the chat.
        max_tokens: of the answer.

    Returns:
        The story of the request, and the answer.

    Raises:
        ValueError: the engine refuses an option or the conversation, in its words.
        RuntimeError: it wrote no trace.
    """
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory(prefix="budgetkv-") as folder:
        section = {"policy": DEFAULT_POLICY, **section_of(given.additional_config or {})}
        trace_file = Path(str(section.setdefault("trace_file", str(Path(folder) / "trace.jsonl"))))
        given.additional_config = {**(given.additional_config or {}), SECTION: section}
        arguments = {item.name: getattr(given, item.name) for item in fields(EngineArgs)}
        old_bytes = trace_file.stat().st_size if trace_file.is_file() else 0
        llm = LLM(**arguments)
        (output,) = llm.chat(
            [list(messages)],
            SamplingParams(max_tokens=max_tokens, temperature=0.0),
            use_tqdm=False,
        )
        return _wait_for_story(trace_file, old_bytes), output.outputs[0].text


def _wait_for_story(path: Path, old_bytes: int) -> Story:
    """The engine writes it in the step behind the answer, in a process of its own."""
    deadline = time.monotonic() + TRACE_WAIT_SECONDS
    while time.monotonic() < deadline:
        story = read_story(path, skipped_bytes=old_bytes) if path.is_file() else None
        if story is not None:
            return story
        time.sleep(0.1)
    raise RuntimeError(f"the engine wrote no trace to {path} within {TRACE_WAIT_SECONDS:.0f} s")


def for_one_request(given: EngineArgs, words: Sequence[str]) -> EngineArgs:
    """What the user left open, for one request: a quick start. Mutates `given`.

    Args:
        given: arguments of an engine.
        words: of the command line that they were read from.
    """
    if not _names(words, "enforce-eager"):
        given.enforce_eager = True
    if not _names(words, "skip-mm-profiling"):
        given.skip_mm_profiling = True
    if given.max_num_seqs is None:
        given.max_num_seqs = 1
    return given


def _names(words: Sequence[str], option: str) -> bool:
    flags = (f"--{option}", f"--no-{option}")
    return any(word.partition("=")[0].replace("_", "-") in flags for word in words)


def with_room(given: EngineArgs, model: ModelConfig) -> None:
    """Let the encoder keep whole videos, where the user said nothing. Mutates `given`."""
    if given.max_num_batched_tokens is None:
        given.max_num_batched_tokens = min(model.max_model_len, MOST_BATCH_TOKENS)


def pictures_of(
    messages: Sequence[dict[str, Any]], model: ModelConfig
) -> dict[str, list[list[Image.Image]]]:
    """The pictures of each image and video by modality, read and sampled as vLLM does it.

    Raises:
        ValueError: vLLM cannot read them, or the model takes none.
    """
    from vllm.renderers.chat_utils import parse_chat_messages

    _, data, _ = parse_chat_messages(list(messages), model, content_format="openai")
    found: dict[str, list[list[Image.Image]]] = {}
    for modality, items in (data or {}).items():
        listed = items if isinstance(items, list) else [items]
        found[modality] = [_frames(getattr(item, "media", item)) for item in listed]
    return found


def _frames(item: Any) -> list[Image.Image]:
    """Pictures of an image, or of the frames of a video; none of what is neither."""
    if isinstance(item, tuple):
        # a video and what is told of it
        item = item[0]
    if isinstance(item, Image.Image):
        return [item]
    if isinstance(item, list):
        return [frame for one in item for frame in _frames(one)]
    found = np.asarray(item)
    if found.ndim == 3 and found.shape[-1] == 3:
        found = found[None]
    if found.ndim != 4 or found.shape[-1] != 3:
        return []
    return [Image.fromarray(frame) for frame in found.astype(np.uint8)]


def decoder_of(model: ModelConfig) -> Callable[[list[int]], str] | None:
    """Text of token ids, special ones as they are written; None for a model without tokenizer."""
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is None:
        return None
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))
