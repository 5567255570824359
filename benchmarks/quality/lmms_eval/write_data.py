"""Writes tasks of the lab as tasks of lmms-eval, with their data; needs no lmms-eval.

    python -m benchmarks.quality.lmms_eval.write_data [--out build/quality/lmms] [--length 2048]
                                                      [--count 20] [--tasks needle order]

OUT becomes a folder for `--include_path`, with the tasks `budgetkv_<task>` and the group
`budgetkv`:

    budgetkv.yaml              the group
    <task>.yaml                the task, see `template.yaml`
    <task>.jsonl               one line per example: messages and answer
    videos/<task>-<index>-<video>.png

A video is a film strip: its frames below each other in one PNG, because a codec would smear cells
of 28 pixels. Each frame stands in it once and is shown `FRAMES_PER_TOKEN` times.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.quality.lab import MAX_ANSWER_TOKENS, parts_of
from benchmarks.quality.scenes import Palette
from benchmarks.quality.suite import TASKS, make_examples
from vllm_budgetkv.testing.shapes import FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from benchmarks.quality.suite import Example

REPOSITORY = Path(__file__).parents[3]
OUT = REPOSITORY / "build" / "quality" / "lmms"
TEMPLATE = Path(__file__).with_name("template.yaml")
GROUP = "budgetkv"


def main() -> None:
    options = parse_arguments()
    write_tasks(options.tasks, options.length, options.count, options.out)
    print(f"{len(options.tasks)} tasks of {options.count} examples: --include_path {options.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tasks of the lab for lmms-eval.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for --include_path")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt, about")
    parser.add_argument("--count", type=int, default=20, help="examples of each task")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    return parser.parse_args()


def write_tasks(names: Sequence[str], length_tokens: int, count: int, out: Path) -> None:
    """Writes tasks, their data and their group; those of an earlier call stay but for the group.

    Args:
        names: keys of `TASKS`.
        length_tokens: about how long the prompts are.
        count: examples of each task.
        out: folder, made if it is missing.

    Raises:
        ValueError: `length_tokens` is too small for a frame or page of some task.
    """
    out = out.resolve()
    (out / "videos").mkdir(parents=True, exist_ok=True)
    palette = Palette()
    for name in names:
        lines = [
            json.dumps(_document(index, example, palette, out))
            for index, example in enumerate(make_examples(name, length_tokens, count))
        ]
        data = out / f"{name}.jsonl"
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_yaml(
            out / f"{name}.yaml",
            {
                "include": str(TEMPLATE),
                "task": f"{GROUP}_{name}",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "generation_kwargs": {"max_new_tokens": MAX_ANSWER_TOKENS, "temperature": 0},
            },
        )
    mean = {"metric": "right", "aggregation": "mean", "weight_by_size": True}
    _write_yaml(
        out / f"{GROUP}.yaml",
        {
            "group": GROUP,
            "task": [f"{GROUP}_{name}" for name in names],
            "aggregate_metric_list": [mean],
        },
    )


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    # JSON is YAML, and nothing has to be quoted by hand
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _document(index: int, example: Example, palette: Palette, out: Path) -> dict[str, Any]:
    """One line of the data set; draws its videos."""
    paths = []
    for number, scene in enumerate(example.talk.scenes):
        path = out / "videos" / f"{example.task}-{index:03d}-{number}.png"
        film_strip(scene, palette).save(path)
        paths.append(str(path))
    return {
        "id": index,
        "depth": example.depth,
        "length_tokens": example.length_tokens,
        "messages": _messages(example, paths),
        "answer": example.answer,
    }


def film_strip(scene: np.ndarray, palette: Palette) -> Image.Image:
    """The frames of a scene, int [F, rows, columns] of cell ids, below each other."""
    frames = palette.draw(scene)[::FRAMES_PER_TOKEN]
    _, _, width, channels = frames.shape
    return Image.fromarray(frames.reshape(-1, width, channels))


def _messages(example: Example, paths: Sequence[str]) -> list[dict[str, Any]]:
    """The turns as `Lab` asks them; every part has all keys, for a table has one type of row."""
    talk = example.talk
    videos = iter(zip(paths, talk.scenes, strict=True))
    messages = []
    for index, (question, answer) in enumerate(talk.turns):
        parts = []
        for part in parts_of(talk.content + question if index == 0 else question):
            row: dict[str, Any] = {"text": part.get("text"), "strip": None, "frames": None}
            if part["type"] == "video":
                path, scene = next(videos)
                row |= {"strip": path, "frames": len(scene)}
            parts.append(row)
        messages.append({"role": "user", "content": parts})
        if index + 1 < len(talk.turns):
            said = {"text": answer, "strip": None, "frames": None}
            messages.append({"role": "assistant", "content": [said]})
    return messages


if __name__ == "__main__":
    main()
