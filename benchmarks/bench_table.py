"""The README's table of measured figures, made from the JSON of `make bench`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

START, STOP = "<!-- bench:start -->", "<!-- bench:stop -->"
MIB = 2**20


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


def write(result: dict[str, Any], readme: Path) -> None:
    """Replace the table between the markers of the README. Mutates the file."""
    text = readme.read_text(encoding="utf-8")
    block = f"{START}\n{table(result)}\n{STOP}"
    text = re.sub(f"{START}.*{STOP}", lambda _: block, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
