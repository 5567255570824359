"""The `vllm serve` line of a plan, to paste into a shell."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vllm_budgetkv.policy.option import flag_of
from vllm_budgetkv.start import platforms
from vllm_budgetkv.start.config import budget_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.cli.plan import Plan

LINE_WIDTH = 78
INDENT = "    "


def serve_arguments(plan: Plan) -> list[list[str]]:
    """The arguments behind `vllm serve MODEL`, a flag with its values in each list."""
    found = [[flag, str(value)] for flag, value in plan.engine.filled_in.items()]
    if plan.keeps_pool:
        assert plan.pool is not None
        found.append(["--kv-cache-memory-bytes", str(plan.pool.num_bytes)])
    found += _given(plan.wishes.server)
    is_off = not plan.choice.is_needed and not _names_ours(found)
    return found if is_off else found + list(_ours(plan))


def _ours(plan: Plan) -> Iterator[list[str]]:
    """Flags of the plugin that the user did not give."""
    if not plan.engine.is_policy_given:
        yield [flag_of("policy"), plan.engine.policy]
    if plan.choice.is_suggested:
        yield [flag_of("page_quota"), str(plan.quota.blocks)]
    is_gpu = plan.wishes.gpu_bytes is not None
    if is_gpu and not platforms.CUDA.is_proven and not plan.choice.config.unproven_device:
        # the server would refuse a GPU without a word that it is a trial
        yield [flag_of("unproven_device")]


def _names_ours(words: list[list[str]]) -> bool:
    """Whether a flag of the plugin is among these."""
    ours = {flag_of(option) for option in budget_options()}
    return any(word[0].partition("=")[0] in ours for word in words)


def serve_line(plan: Plan) -> str:
    """The whole line, broken where a shell goes on reading."""
    words = [["vllm", "serve", plan.wishes.model], *serve_arguments(plan)]
    lines, line = [], ""
    for word in map(shlex.join, words):
        if line and len(line) + len(word) + 3 > LINE_WIDTH:
            lines.append(line)
            line = INDENT + word
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])


def _given(arguments: tuple[str, ...]) -> Iterator[list[str]]:
    """What the user gave for the server, each flag with what follows it."""
    word: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and word:
            yield word
            word = []
        word.append(argument)
    if word:
        yield word
