"""The tables of measured figures in README and docs, made from the JSON of `make bench`."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
SLOW = 0.9


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per prompt size, stock and ours and their ratio."""
    lines = [
        "| prompt tokens | KV held, stock / ours | smaller | prefill, stock / ours | faster | "
        "decode, stock / ours | faster | compression of prefill |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stock, ours = result["engine"]["stock"], result["engine"]["ours"]
    for size, theirs in stock.items():
        mine = ours[size]
        lines.append(
            f"| {int(theirs['prompt_tokens']):,} "
            f"| {theirs['kv_bytes'] / MIB:.0f} / {mine['kv_bytes'] / MIB:.0f} MiB "
            f"| {theirs['kv_bytes'] / mine['kv_bytes']:.1f}x "
            f"| {theirs['prefill_seconds']:.1f} / {mine['prefill_seconds']:.1f} s "
            f"| {theirs['prefill_seconds'] / mine['prefill_seconds']:.2f}x "
            f"| {theirs['decode_ms']:.1f} / {mine['decode_ms']:.1f} ms "
            f"| {theirs['decode_ms'] / mine['decode_ms']:.2f}x "
            f"| {100 * mine['compression_seconds'] / mine['prefill_seconds']:.1f} % |"
        )
    about = result["about"]
    shape = ", ".join(f"{name} {value}" for name, value in about["model"].items())
    lines += [
        "",
        f"`{about['command']}` at {about['commit']}, {about['machine']}; Qwen2.5-VL with random "
        f"weights ({shape}), quota {about['quota_tokens']} tokens, chunks of "
        f"{about['chunk_tokens']}, {about['output_tokens']} output tokens; medians.",
    ]
    return "\n".join(lines)


def kernel_table(result: dict[str, Any]) -> str:
    """Markdown: attention against vLLM's own, and every other op against its reference."""
    attention = result["kernels"]["attention"]["vllm_seconds_over_ours"]
    lines = [
        "| attention, vLLM's time over ours | cases | least | median | most | below 0.9 |",
        "|---|---|---|---|---|---|",
    ]
    # the last part of a case's name says how keys and values are stored
    for kind in ("prefill", "decode"):
        for stored in ("float32", "bfloat16", "8-bit keys and values"):
            ratios = [
                ratio
                for name, ratio in attention.items()
                if name.startswith(kind) and name.endswith(stored)
            ]
            if not ratios:
                continue
            slow = sum(ratio < SLOW for ratio in ratios)
            lines.append(
                f"| {kind}, {stored} | {len(ratios)} | {min(ratios):.2f} "
                f"| {statistics.median(ratios):.2f} | {max(ratios):.2f} | {slow} |"
            )
    losses = [f"{name}: {ratio:.2f}" for name, ratio in attention.items() if ratio < SLOW]
    lines += ["", "Below 0.9: " + ("; ".join(losses) or "none") + "."]
    lines += ["", "| op (4 heads, group 4, 3,000 tokens) | kernel | reference over kernel |"]
    lines.append("|---|---|---|")
    for name, found in result["kernels"]["ops"]["results"].items():
        ratio = found["reference_ms"] / found["kernel_ms"]
        lines.append(f"| {name} | {found['kernel_ms']:.2f} ms | {ratio:.0f}x |")
    about = result["about"]
    lines += ["", f"`{about['command']}` at {about['commit']}, {about['machine']}."]
    return "\n".join(lines)


def write(result: dict[str, Any], repository: Path) -> None:
    """Replace the tables between the markers of README and docs. Mutates the files."""
    replace(repository / "README.md", "bench", table(result))
    replace(repository / "docs" / "performance.md", "kernels", kernel_table(result))


def replace(file: Path, mark: str, block: str) -> None:
    """Put `block` between the comments `mark:start` and `mark:stop` of a Markdown file."""
    start, stop = f"<!-- {mark}:start -->", f"<!-- {mark}:stop -->"
    text = file.read_text(encoding="utf-8")
    between = f"{start}\n{block}\n{stop}"
    text = re.sub(f"{start}.*{stop}", lambda _: between, text, flags=re.DOTALL)
    file.write_text(text, encoding="utf-8")
