"""The same as PNG files, for slides and reports. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_budgetkv.inspection import charts, tiles
from vllm_budgetkv.inspection.labels import brightest, labels_of, share_text
from vllm_budgetkv.inspection.words import pieces_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm_budgetkv.inspection.conversation import Conversation
    from vllm_budgetkv.inspection.story import HeadClass, Item, Story
    from vllm_budgetkv.inspection.words import Piece

COLOURS = {"static": "#2f6db3", "dynamic": "#b25410"}
INK, FAINT, TEXT_ZONE = "#1b1f23", "#59636e", "#3d9a50"
COLUMNS, MOST_FRAMES = 16, 32
WIDTH_INCHES, DPI = 16.0, 110
# of a line of text
LINE_CHARACTERS, MOST_LINES = 110, 60


def require_matplotlib() -> None:
    """Refuse early.

    Raises:
        ValueError: it is not installed, and how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib: pip install 'vllm-budgetkv[plots]'")


def draw_all(story: Story, conversation: Conversation, folder: Path) -> list[Path]:
    """Draw what the story has: kept.png, text.png, heads.png and blocks.png.

    Args:
        story: of the request.
        conversation: what the trace does not hold.
        folder: that is there; files of these names are replaced.

    Returns:
        What was written.
    """
    written = []
    if story.is_read:
        written.append(draw_kept(story, conversation, folder / "kept.png"))
        written.append(draw_text(story, conversation, folder / "text.png"))
        written.append(draw_heads(story, folder / "heads.png"))
    if len(story.steps):
        written.append(draw_blocks(story, folder / "blocks.png"))
    return written


def _figure(height_inches: float) -> Figure:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.figure(figsize=(WIDTH_INCHES, height_inches), facecolor="white")


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def draw_kept(story: Story, conversation: Conversation, path: Path) -> Path:
    """What each class of head kept: over the prompt, and lit in the frames of its largest item."""
    framed = [item for item in story.items if item.num_frames]
    item = max(framed, key=lambda one: one.positions.size, default=None)
    frames = tiles.chosen_frames(item, story.share, MOST_FRAMES) if item else []
    num_rows = -(-len(frames) // COLUMNS)
    strip = 0.6 + 1.02 * num_rows
    heights = [2.7, *([strip] * len(story.classes) if item else [])]
    figure = _figure(0.2 + sum(heights))
    chart, *strips = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    _draw_chart(chart, story)
    for part, one in zip(strips, story.classes, strict=False):
        assert item is not None
        pictures = conversation.pictures_of(item)
        found = tiles.tiles_of(item, one, frames, pictures, brightest(story))
        _draw_strip(part, labels_of(story)[one.name], one, item, found)
    return _save(figure, path)


def _heading(figure: Figure, story: Story) -> None:
    record = story.record
    peak, full = record["peak_blocks"], record["full_cache_blocks"]
    quota = f" (quota {record['quota_blocks']})" if story.has_quota else ""
    ratio = f", {full / peak:.1f} times as many" if peak else ""
    figure.text(0.012, 0.88, "What stays of a prompt", size=17, weight="bold", color=INK)
    figure.text(
        0.012, 0.785,
        f"policy {record['policy']}: {story.prompt_tokens:,} prompt tokens in {peak} blocks of "
        f"{record['block_tokens']} tokens{quota}; the full cache needs {full}{ratio}",
        size=11.5, color=INK,
    )  # fmt: skip


def _draw_chart(figure: Figure, story: Story) -> None:
    axes = figure.add_axes((0.045, 0.2, 0.94, 0.52))
    _heading(figure, story)
    for one in story.classes:
        values = charts.binned(one.share)
        edges = np.linspace(0, story.prompt_tokens, values.size + 1)
        label = f"{labels_of(story)[one.name]} ({one.num_heads})"
        axes.stairs(values, edges, fill=True, color=COLOURS[one.name], alpha=0.25)
        axes.stairs(values, edges, color=COLOURS[one.name], linewidth=1.1, label=label)
    for left, width in charts.zones(~story.is_vision):
        scale = story.prompt_tokens / 100
        span = (left * scale, (left + width) * scale)
        axes.axvspan(*span, color=TEXT_ZONE, alpha=0.18, linewidth=0)
    axes.set_xlim(0, story.prompt_tokens)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("prompt position (green: text)", color=INK)
    axes.set_ylabel("heads that kept it", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _plain(axes)
    axes.legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.0))


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _draw_strip(
    figure: Figure, label: str, heads: HeadClass, item: Item, found: Sequence[tiles.Tile]
) -> None:
    figure.text(
        0.012, 0.94, label, va="top", size=13, weight="bold", color=COLOURS[heads.name]
    )  # fmt: skip
    kept = share_text(float(heads.share[item.positions].mean()))
    note = f"{item.name}: {kept} of the patches are kept, on average, and lit"
    figure.text(0.115, 0.935, note, va="top", size=11, color=FAINT)
    num_rows = -(-len(found) // COLUMNS)
    grid = figure.add_gridspec(
        num_rows, COLUMNS, left=0.012, right=0.988, bottom=0.03, top=0.79, wspace=0.06, hspace=0.22
    )
    for place, tile in enumerate(found):
        axes = figure.add_subplot(grid[place // COLUMNS, place % COLUMNS])
        axes.imshow(np.asarray(tile.picture))
        title = f"{tile.frame + 1} · {share_text(tile.kept_ratio)}"
        axes.set_title(title, size=7.5, color=FAINT, pad=1.5)
        axes.set_axis_off()


def draw_heads(story: Story, path: Path) -> Path:
    """The class of each head behind each compression, and what it kept over the prompt."""
    figure = _figure(2.2 + min(7.0, 0.16 * story.num_all_heads))
    left, right = figure.subplots(1, 2)
    num_layers, num_heads = story.shape
    extent_rows = (story.num_all_heads, 0)
    if len(story.class_history):
        num_columns = len(story.class_history)
        left.imshow(
            np.asarray(charts.class_rows(story)),
            aspect="auto",
            interpolation="nearest",
            extent=(0, num_columns, *extent_rows),
        )
    stride = story.trace["class_stride"]
    left.set_xlabel("compression" + (f", one of {stride}" if stride > 1 else ""))
    title = "class of each head: " if story.tells_classes else "this policy knows one class only"
    left.set_title(title + ("blue static, orange dynamic" * story.tells_classes), size=11)
    kept = charts.kept_rows(story)
    if kept is not None:
        extent = (0, story.prompt_tokens, *extent_rows)
        right.imshow(np.asarray(kept), aspect="auto", interpolation="nearest", extent=extent)
    right.set_xlabel("prompt position")
    right.set_title("what each head kept: the stronger, the more of a place", size=11)
    every = max(1, num_layers // 12)
    for axes in (left, right):
        ticks = range(0, num_layers, every)
        axes.set_yticks(
            [(layer + 0.5) * num_heads for layer in ticks], [f"layer {one}" for one in ticks]
        )
        _plain(axes)
    figure.tight_layout()
    return _save(figure, path)


def draw_blocks(story: Story, path: Path) -> Path:
    """Blocks over time against the quota and a full cache."""
    figure = _figure(4.0)
    axes = figure.add_axes((0.05, 0.15, 0.93, 0.7))
    seconds, seen, held = story.steps[:, 0], story.steps[:, 1], story.steps[:, 2]
    full = np.ceil(seen / story.record["block_tokens"])
    quota = story.record["quota_blocks"] if story.has_quota else 0
    top = 1.25 * max(1.0, float(held.max()), quota)
    blue = COLOURS["static"]
    axes.fill_between(seconds, held, step="post", color=blue, alpha=0.2, label="held")
    used = story.num_pages
    axes.fill_between(seconds, used, step="post", color=blue, alpha=0.5, label="used by its heads")
    ends = f", ends at {int(full.max()):,}" if full.max() > top else ""
    line: dict[str, Any] = {"color": FAINT, "linestyle": ":", "label": f"a full cache{ends}"}
    axes.step(seconds, full, where="post", **line)
    if quota:
        label = f"quota {quota:,}"
        axes.axhline(quota, color=COLOURS["dynamic"], linestyle="--", label=label)
    if np.isfinite(story.prompt_seconds):
        axes.axvline(story.prompt_seconds, color=FAINT, linewidth=0.8, label="end of the prompt")
    axes.set_xlim(0, float(seconds[-1]) or 1.0)
    axes.set_ylim(0, top)
    axes.set_xlabel("seconds since the request was admitted")
    axes.set_ylabel(f"blocks of {story.record['block_tokens']} tokens")
    _plain(axes)
    axes.legend(loc="lower right", ncols=5, frameon=False, bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def draw_text(story: Story, conversation: Conversation, path: Path) -> Path:
    """The prompt's text with a bar for each class of head under each word, in fixed columns."""
    rows = list(_laid_out(pieces_of(story, conversation.decode)))
    num_rows = min(MOST_LINES, 1 + max((row for row, _, _, _ in rows), default=0))
    figure = _figure(0.9 + 0.34 * num_rows)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96 - 0.45 / (0.9 + 0.34 * num_rows)))
    axes.set_xlim(0, LINE_CHARACTERS)
    axes.set_ylim(num_rows, 0)
    axes.set_axis_off()
    size = WIDTH_INCHES * 0.96 * 72 / LINE_CHARACTERS / 0.602
    for row, column, text, piece in rows:
        if row >= num_rows:
            break
        style: dict[str, Any] = {"family": "monospace", "size": size, "va": "center"}
        colour = INK if piece.kind == "text" else FAINT
        # a dollar would begin a formula
        axes.text(column, row + 0.38, text.replace("$", r"\$"), color=colour, **style)
        for number, one in enumerate(story.classes):
            share = float(one.share[piece.start : piece.stop].mean())
            if share:
                axes.plot(
                    [column, column + len(text)],
                    [row + 0.74 + 0.1 * number] * 2,
                    color=COLOURS[one.name],
                    alpha=0.15 + 0.85 * min(1.0, share),
                    linewidth=2.2,
                    solid_capstyle="butt",
                )
    names = " and ".join(
        f"{labels_of(story)[one.name]} ({'blue' if one.name == 'static' else 'orange'})"
        for one in story.classes
    )
    figure.suptitle(f"Bars: the share of {names} that kept a word", size=11, color=INK, y=0.99)
    return _save(figure, path)


def _laid_out(pieces: Sequence[Piece]) -> list[tuple[int, int, str, Piece]]:
    """Row, column and text of each part of a piece, in lines of fixed width."""
    found: list[tuple[int, int, str, Piece]] = []
    row = column = 0
    for piece in pieces:
        text = piece.text
        if piece.kind != "text":
            name = piece.text or "left out"
            text = f" [{name}, {piece.stop - piece.start:,} tokens] "
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if number:
                row, column = row + 1, 0
            if column and column + len(line) > LINE_CHARACTERS:
                row, column = row + 1, 0
            for start in range(0, len(line), LINE_CHARACTERS):
                part = line[start : start + LINE_CHARACTERS]
                if start:
                    row, column = row + 1, 0
                found.append((row, column, part, piece))
                column += len(part)
    return found
