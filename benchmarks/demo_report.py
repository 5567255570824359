"""The text and the picture at the end of the demo, made from one record of `--kv-report-file`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from benchmarks.demo import Answer

CLASSES = {"static": "#2f6db3", "dynamic": "#d1742a"}
COLUMNS, MOST_FRAMES = 16, 32
SMOOTHING_TOKENS = 9
INK, FAINT = "#222222", "#8a8a8a"


def describe(record: dict[str, Any], answer: Answer, picture: Path) -> str:
    """The report as text.

    Args:
        record: of the request, as the server wrote it.
        answer: what the client saw.
        picture: where the picture is.
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


@dataclass(frozen=True)
class Shares:
    """For one class of head: which share of its heads kept each prompt position, `[tokens]`."""

    name: str
    num_heads: int
    by_position: np.ndarray

    def frames(self, item: dict[str, Any]) -> np.ndarray:
        """The shares of one vision item as `[frames, rows, columns]`."""
        span = self.by_position[item["offset"] : item["offset"] + item["length"]]
        return span.reshape(-1, *item["grid"])


def draw(record: dict[str, Any], video: np.ndarray, picture: Path) -> None:
    """Writes the picture of what each class of head kept.

    Args:
        record: of the request; its first vision item is the video.
        video: uint8 `[frames, height, width, 3]`.
        picture: the PNG to write; its folder is made.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    item = record["frames"][0]
    classes = [
        Shares(
            name,
            record["heads"][name],
            np.asarray(record["kept_counts"][name]) / max(1, record["heads"][name]),
        )
        for name in CLASSES
    ]
    brightest = max(float(shares.frames(item).max()) for shares in classes)
    paint = mpl.cm.ScalarMappable(PowerNorm(0.6, 0.0, max(brightest, 1e-6)), "inferno")
    num_rows = _num_strip_rows(item)
    figure = plt.figure(figsize=(16, 2.9 + 2 * (0.5 + 1.02 * num_rows)), facecolor="white")
    heights = [2.7, *[0.5 + 1.02 * num_rows] * len(classes)]
    chart, *strips = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    _draw_chart(chart, record, item, classes)
    for strip, shares in zip(strips, classes, strict=True):
        _draw_strip(strip, shares, item, video, paint)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _num_strip_rows(item: dict[str, Any]) -> int:
    return -(-min(MOST_FRAMES, item["length"] // item["tokens_per_frame"]) // COLUMNS)


def _draw_chart(
    figure: Figure, record: dict[str, Any], item: dict[str, Any], classes: list[Shares]
) -> None:
    axes = figure.add_axes((0.045, 0.2, 0.94, 0.52))
    peak, full = record["peak_blocks"], record["full_cache_blocks"]
    figure.text(
        0.012, 0.88, "What stays of a long video under a page quota",
        size=17, weight="bold", color=INK,
    )  # fmt: skip
    figure.text(
        0.012, 0.785,
        f"policy {record['policy']}: {record['prompt_tokens']:,} prompt tokens in {peak} blocks of "
        f"{record['page_tokens']} tokens (quota {record['quota_blocks']}); the full cache needs "
        f"{full}, {full / peak:.1f} times as many",
        size=11.5, color=INK,
    )  # fmt: skip
    window = np.ones(SMOOTHING_TOKENS) / SMOOTHING_TOKENS
    for shares in classes:
        curve = np.convolve(shares.by_position, window, mode="same")
        axes.fill_between(np.arange(curve.size), curve, color=CLASSES[shares.name], alpha=0.25)
        label = f"{shares.name} heads ({shares.num_heads})"
        axes.plot(curve, color=CLASSES[shares.name], linewidth=1.1, label=label)
    _style_chart(axes, record["prompt_tokens"], item)


def _style_chart(axes: Axes, prompt_tokens: int, item: dict[str, Any]) -> None:
    start, end = item["offset"], item["offset"] + item["length"]
    for left, right in ((0, start), (end, prompt_tokens)):
        axes.axvspan(left, right, color="#3d9a50", alpha=0.18, linewidth=0, label="_text")
    axes.set_xlim(0, prompt_tokens)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("prompt position (green: text)", color=INK)
    axes.set_ylabel("heads that kept it", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.0))


def _draw_strip(
    figure: Figure,
    shares: Shares,
    item: dict[str, Any],
    video: np.ndarray,
    paint: ScalarMappable,
) -> None:
    heats = shares.frames(item)
    shown = np.unique(np.linspace(0, len(heats) - 1, min(MOST_FRAMES, len(heats))).astype(int))
    num_rows = _num_strip_rows(item)
    figure.text(
        0.012, 0.94, f"{shares.name} heads", va="top",
        size=13, weight="bold", color=CLASSES[shares.name],
    )  # fmt: skip
    note = "none in this request" if not shares.num_heads else f"{heats.mean():.1%} of the patches"
    figure.text(0.115, 0.935, note, va="top", size=11, color=FAINT)
    grid = figure.add_gridspec(
        num_rows, COLUMNS, left=0.012, right=0.93, bottom=0.03, top=0.84, wspace=0.06, hspace=0.22
    )
    video_frames_each = len(video) / len(heats)
    for place, index in enumerate(shown):
        axes = figure.add_subplot(grid[place // COLUMNS, place % COLUMNS])
        axes.imshow(_overlay(video[int(index * video_frames_each)], heats[index], paint))
        axes.set_title(f"{int(index * video_frames_each)}", size=7.5, color=FAINT, pad=1.5)
        axes.set_axis_off()
    bar = figure.colorbar(paint, cax=figure.add_axes((0.945, 0.06, 0.008, 0.74)))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    bar.set_label("heads that kept the patch", size=8, color=FAINT)


def _overlay(frame: np.ndarray, heat: np.ndarray, paint: ScalarMappable) -> np.ndarray:
    """The frame in pale colours, with the colour of `heat` over each of its cells. RGB float."""
    height, width = frame.shape[0] // heat.shape[0], frame.shape[1] // heat.shape[1]
    cells = np.kron(heat, np.ones((height, width)))[..., None]
    picture = frame[: cells.shape[0], : cells.shape[1]] / 255.0
    pale = 0.45 * picture.mean(axis=2, keepdims=True) + 0.4 * picture + 0.15
    strength = 0.85 * np.sqrt(cells / paint.get_clim()[1])
    colour = paint.to_rgba(cells[..., 0])[..., :3]
    return np.clip(pale * (1 - strength) + colour * strength, 0, 1)
