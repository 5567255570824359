"""`vllm-budgetkv inspect`: a conversation, and the page that shows what was kept of it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.inspection.conversation import Conversation
    from vllm_budgetkv.inspection.story import Story

USAGE = (
    "vllm-budgetkv inspect --model MODEL [--image FILE ...] [--video FILE ...] --question TEXT "
    "[--out PAGE.html] [--png DIR] [options of vllm serve]"
)
STORY = """\
One HTML page of a conversation: frames with what heads kept of them lit, the prompt's text, the
class of each head and how it changed, blocks over time against the quota. It holds all that it
needs, and asks the network for nothing.

Starts an engine, asks it and ends it. With --trace it starts none and shows a request that a server
or an LLM with --kv-trace-file has served. Every other option is one of `vllm serve`, as
--kv-policy, --kv-page-quota, --kv-chunk-tokens, --max-model-len, --dtype, --media-io-kwargs.
"""
EXAMPLE = """\
examples:
  vllm-budgetkv inspect --model MODEL --video v.mp4 --question "Who wins?" --kv-page-quota 64
  vllm-budgetkv inspect --model MODEL --trace trace.jsonl --video v.mp4
"""
DEFAULT_PAGE, DEFAULT_TOKENS = "inspect.html", 64
# a page is read in a browser
MOST_TOKENS = 4096


class _AppendMedia(argparse.Action):
    """Keeps images and videos in one list, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kind = str(option_string).strip("-")
        namespace.media = [*namespace.media, (kind, values)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `vllm serve` has not. Mutates `parser`."""
    add = parser.add_argument
    add("--model", required=True, help="name on the Hugging Face hub, or a folder")
    for kind in ("image", "video"):
        add(
            f"--{kind}",
            action=_AppendMedia,
            dest="media",
            default=[],
            metavar="FILE",
            help=f"a file with an {kind}"
            if kind == "image"
            else "a file with a video; repeat both",
        )
    add("--question", metavar="TEXT", help="what is asked about them")
    add(
        "--messages",
        metavar="FILE",
        help="instead of both: a JSON list of chat messages, as a server takes them",
    )
    add("--trace", metavar="FILE", help="show a request of this file, without starting an engine")
    add("--request", metavar="ID", help="with --trace: which request (default: the last)")
    add(
        "--max-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"most tokens of the answer (default: {DEFAULT_TOKENS})",
    )
    add("--out", default=DEFAULT_PAGE, metavar="FILE", help=f"the page (default: {DEFAULT_PAGE})")
    add("--png", metavar="DIR", help="write the pictures as PNG files there too; needs matplotlib")


def run_inspect(options: argparse.Namespace, others: Sequence[str], words: Sequence[str]) -> int:
    """Show a conversation.

    Args:
        options: of `add_options`.
        others: for vLLM.
        words: the whole command line, to be told in the page.

    Returns:
        The exit status: 1 where the engine failed, 2 for what cannot be shown or is refused.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # of memory that a CPU's cache takes, in GiB; vLLM would take nearly all there is
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm_budgetkv.cli.wishes import in_words

    command = shlex.join(["vllm-budgetkv", *words])
    try:
        _check(options)
        story, conversation = _inspect(options, others, command)
        files = _write(options, story, conversation)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"vllm-budgetkv inspect: {in_words(error)}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(
            f"vllm-budgetkv inspect: the engine failed: {error}; VLLM_LOGGING_LEVEL=INFO says "
            "more\n"
        )
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in files))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse before an engine starts what its end would meet.

    Raises:
        ValueError: in the user's words.
    """
    if options.trace is None:
        if (options.question is None) == (options.messages is None):
            raise ValueError("give --question TEXT, with --image and --video; or --messages FILE")
        if options.request is not None:
            raise ValueError("--request is a request of --trace: give that too")
    if options.messages is not None and options.media:
        raise ValueError("--messages holds its images and videos: remove --image and --video")
    if not 1 <= options.max_tokens <= MOST_TOKENS:
        raise ValueError(f"--max-tokens must be from 1 to {MOST_TOKENS}; got {options.max_tokens}")
    page = Path(options.out)
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise ValueError(f"--out {page} cannot be written: name a file in a directory that exists")
    if options.png is not None:
        from vllm_budgetkv.inspection.pictures import require_matplotlib

        require_matplotlib()
        Path(options.png).mkdir(parents=True, exist_ok=True)


def _inspect(
    options: argparse.Namespace, others: Sequence[str], command: str
) -> tuple[Story, Conversation]:
    from vllm_budgetkv.cli.engine import read_arguments
    from vllm_budgetkv.inspection import engine
    from vllm_budgetkv.inspection.conversation import Conversation
    from vllm_budgetkv.inspection.messages import messages_of, read_messages
    from vllm_budgetkv.inspection.story import read_story

    if options.messages is not None:
        messages = read_messages(options.messages)
    else:
        messages = messages_of(options.media, options.question or "")
    given = read_arguments(["--model", options.model, *others], "inspect")
    model = engine.for_one_request(given, others).create_model_config()
    pictures = engine.pictures_of(messages, model)
    answer: str | None = None
    if options.trace is not None:
        story = read_story(Path(options.trace), options.request)
        if story is None:
            asked = "any request" if options.request is None else f"request {options.request}"
            raise ValueError(f"--trace {options.trace} has no line of {asked}")
    else:
        engine.with_room(given, model)
        story, answer = engine.ask(given, messages, options.max_tokens)
    decode = engine.decoder_of(model)
    return story, Conversation(options.model, pictures, decode, answer, command)


def _write(options: argparse.Namespace, story: Story, conversation: Conversation) -> list[Path]:
    """Write what was asked for; the files, in order."""
    from vllm_budgetkv.inspection.page import render

    page = Path(options.out)
    page.write_text(render(story, conversation), encoding="utf-8")
    if options.png is None:
        return [page]
    from vllm_budgetkv.inspection.pictures import draw_all

    return [page, *draw_all(story, conversation, Path(options.png))]
