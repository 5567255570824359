"""Two plots of `make bench`: memory that one request holds, and how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

COLOURS = {"stock": "#8a8f98", "ours": "#1f6feb"}
NAMES = {"stock": "stock vLLM, full cache", "ours": "quota of a tenth, hybrid"}
MIB = 2**20


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write `bench_memory.png` and `bench_speed.png` into `folder`."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    _lines(axes, result, "kv_bytes", 1 / MIB, "KV memory held at the peak (MiB)")
    axes.set_title("One request's KV memory")
    figure.savefig(folder / "bench_memory.png", dpi=150)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    _lines(left, result, "prefill_seconds", 1.0, "prefill (s)")
    _lines(right, result, "decode_ms", 1.0, "decode (ms a token)")
    left.set_title("Prefill")
    right.set_title("Decode")
    figure.savefig(folder / "bench_speed.png", dpi=150)
    plt.close(figure)


def _lines(axes: Axes, result: dict[str, Any], field: str, factor: float, label: str) -> None:
    last = {}
    for side, sizes in result["engine"].items():
        points = sorted((f["prompt_tokens"], f[field] * factor) for f in sizes.values())
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, marker="o", color=COLOURS[side], label=NAMES[side])
        last[side] = (tokens[-1], values[-1])
    ratio = last["stock"][1] / last["ours"][1]
    axes.annotate(
        f"{ratio:.1f}x",
        last["ours"],
        textcoords="offset points",
        xytext=(-4, 8),
        ha="right",
        color=COLOURS["ours"],
    )
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
