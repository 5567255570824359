"""The command line: `vllm-budgetkv plan`, `inspect` and `doctor`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from vllm_budgetkv import __version__
from vllm_budgetkv.cli import inspecting

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "Vision-language models on stock vLLM inside a hard, per-request KV page quota."
PLAN_USAGE = (
    "vllm-budgetkv plan --model MODEL [--gpu-memory SIZE] [--tokens N] [--concurrency N] "
    "[options of vllm serve]"
)
PLAN_STORY = """\
What a KV quota buys, from the model's configuration alone: no GPU, no weights, no start.

Without a quota it suggests the largest with which all requests run at once. Every other option is
one of `vllm serve` and means the same here, as --kv-page-quota, --kv-quota-tokens,
--kv-quota-ratio, --kv-chunk-tokens, --kv-host-memory, --block-size, --dtype,
--tensor-parallel-size, --gpu-memory-utilization, --kv-cache-memory-bytes, --skip-mm-profiling.
"""
PLAN_EXAMPLE = """\
example:
  vllm-budgetkv plan --model Qwen/Qwen2.5-VL-7B-Instruct --gpu-memory 80GiB --tokens 200000 \\
      --concurrency 8
"""
DOCTOR_STORY = """\
Whether this installation works: the package, the entry point, VLLM_PLUGINS, each symbol of vLLM's
that is touched, the compiled kernels, Triton and the device. Exits with 1 if something is wrong.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit status: 1 where `doctor` found something wrong or an engine failed, 2 where `plan`
        or `inspect` was asked for what no server would start with.
    """
    parser, plan = _parsers()
    options, others = parser.parse_known_args(arguments)
    if options.command == "plan":
        return _plan(options, others, plan)
    if options.command == "inspect":
        return inspecting.run_inspect(
            options, others, sys.argv[1:] if arguments is None else arguments
        )
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    from vllm_budgetkv.cli.doctor import run_doctor

    return run_doctor(as_json=options.json)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """That of all commands and that of `plan`."""
    parser = argparse.ArgumentParser(prog="vllm-budgetkv", description=PROGRAM)
    parser.add_argument("--version", action="version", version=f"vllm-budgetkv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # an option that is not known here is vLLM's, never an abbreviation of ours
    plan = commands.add_parser(
        "plan",
        help="what a quota buys on a GPU, and the `vllm serve` line for it",
        usage=PLAN_USAGE,
        description=PLAN_STORY,
        epilog=PLAN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_plan_options(plan)
    inspecting.add_options(
        commands.add_parser(
            "inspect",
            help="a conversation, and a page that shows what was kept of it",
            usage=inspecting.USAGE,
            description=inspecting.STORY,
            epilog=inspecting.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    doctor = commands.add_parser(
        "doctor",
        help="whether this installation works, and what to do if not",
        description=DOCTOR_STORY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser, plan


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options that `vllm serve` has not, or whose default differs here. Mutates `parser`."""
    add = parser.add_argument
    add("--model", required=True, help="name on the Hugging Face hub, or a folder with config.json")
    add(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the longest request, prompt and answer together (default: as many as "
        "--max-model-len, or the model, allows)",
    )
    add(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="requests of that length that shall run at once (default: 1)",
    )
    add("--gpu-memory", metavar="SIZE", help="memory of each GPU, as 80GiB")
    add(
        "--weights",
        metavar="SIZE",
        help="size of all weights, as 15GiB (default: read from the model's files)",
    )
    add(
        "--reserve",
        metavar="SIZE",
        default="2GiB",
        help="memory of each GPU for what no configuration tells: CUDA's context and graphs, "
        "buffers of NCCL (default: 2GiB)",
    )
    add("--json", action="store_true", help="one JSON object instead of tables")


def _plan(
    options: argparse.Namespace, others: Sequence[str], parser: argparse.ArgumentParser
) -> int:
    # no configuration needs a device, but vLLM's parser fails where it finds none
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    # what vLLM logs while it reads a configuration is not the answer
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_budgetkv.cli.plan import make_plan
    from vllm_budgetkv.cli.plan_page import show_plan
    from vllm_budgetkv.cli.wishes import Wishes, in_words

    try:
        plan = make_plan(Wishes.of(options, others))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"vllm-budgetkv plan: {in_words(error)}\n")
        return 2
    show_plan(plan, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
