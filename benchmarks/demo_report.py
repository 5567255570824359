"""The text at the end of the demo, made from one record of `--kv-report-file`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.demo import Answer

CLASSES = ("static", "dynamic")


def describe(record: dict[str, Any], answer: Answer, picture: Path, page: Path) -> str:
    """The report as text.

    Args:
        record: of the request, as the server wrote it.
        answer: what the client saw.
        picture: where the picture is.
        page: where the page is.
    """
    peak, full = record["peak_blocks"], record["full_cache_blocks"]
    held, whole = record["kv_bytes"], full * record["block_bytes"]
    rows = {
        "answer": repr(answer.text),
        "prompt tokens": f"{answer.prompt_tokens:,}",
        "blocks at peak": f"{peak}, quota {record['quota_blocks']}; the full cache needs {full}",
        "KV bytes": f"{_mib(held)} with all tables; full cache {_mib(whole)}, {whole / held:.1f} x",
        "kept after prefill": "; ".join(_kept(record, name) for name in CLASSES),
        "compressions": f"{record['compressions']}, {1e3 * record['compression_seconds']:.0f} ms",
        "time to first token": f"{answer.first_token_s:.2f} s; whole answer {answer.total_s:.2f} s",
        "picture": str(picture),
        "page": str(page),
    }
    width = max(map(len, rows))
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""])


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _kept(record: dict[str, Any], name: str) -> str:
    heads = record["heads"][name]
    if not heads:
        return f"no {name} head"
    kept = record["kept"][name]
    return (
        f"{heads} {name} heads: {kept['text'] / heads:.0f} text and "
        f"{kept['vision'] / heads:.0f} vision tokens each"
    )
