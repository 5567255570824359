"""One line of `--kv-trace-file`, read and checked: what pictures and the page are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_budgetkv.cache.summary import CLASSES
from vllm_budgetkv.cache.trace import unpacked_bits

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

FULL_POLICY = "full"


@dataclass(frozen=True)
class HeadClass:
    """Heads that are shown together.

    Args:
        name: "static" or "dynamic".
        num_heads: (layer, head) pairs.
        share: float64 [P], the share of them that kept each position of the prompt.
    """

    name: str
    num_heads: int
    share: np.ndarray


@dataclass(frozen=True)
class Item:
    """A picture or video of the prompt.

    Args:
        modality: "image", "video" or another kind.
        number: among those of its modality, from 1.
        positions: int64 [n], those that take an embedding, in order.
        runs: (frames, rows, columns) that fill `positions` in order; none where the frames are not
            known.
    """

    modality: str
    number: int
    positions: np.ndarray
    runs: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.modality} {self.number}"

    @property
    def num_frames(self) -> int:
        """Frames of known shape; 0 if none is known."""
        return sum(frames for frames, _, _ in self.runs)

    @cached_property
    def frame_ends(self) -> np.ndarray:
        """int64 [frames]: how many of `positions` are those of a frame and all before it."""
        sizes = [rows * columns for frames, rows, columns in self.runs for _ in range(frames)]
        return np.cumsum(np.asarray(sizes, dtype=np.int64))

    @cached_property
    def frame_positions(self) -> list[np.ndarray]:
        """Position of every patch of each frame, int64 [rows, columns]."""
        found, start = [], 0
        for frames, rows, columns in self.runs:
            size = rows * columns
            for _ in range(frames):
                found.append(self.positions[start : start + size].reshape(rows, columns))
                start += size
        return found


@dataclass(frozen=True)
class Story:
    """What happened to one request.

    Args:
        record: fields of `cache.report.RequestRecord`.
        trace: fields of `cache.trace.Trace`.
    """

    record: dict[str, Any]
    trace: dict[str, Any]

    @classmethod
    def of_line(cls, line: str) -> Self:
        """Read one line of the file.

        Raises:
            ValueError: it is no such line.
        """
        try:
            fields = json.loads(line)
            story = cls(fields["record"], fields["trace"])
            story.check()
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(
                f"a line that is no trace of --kv-trace-file ({type(error).__name__}: {error})"
            ) from error
        return story

    def check(self) -> None:
        """Read all that is read later."""
        _ = (self.items, self.classes, self.kept, self.steps, self.class_history, self.num_pages)

    @property
    def prompt_tokens(self) -> int:
        return int(self.trace["prompt_tokens"])

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        num_layers, num_heads = self.trace["shape"]
        return int(num_layers), int(num_heads)

    @property
    def num_all_heads(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def has_quota(self) -> bool:
        return self.record["policy"] != FULL_POLICY

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt was computed."""
        return bool(self.trace["held_tokens"])

    @cached_property
    def items(self) -> tuple[Item, ...]:
        counts: dict[str, int] = {}
        found = []
        for item in self.trace["items"]:
            modality = str(item["modality"])
            counts[modality] = counts.get(modality, 0) + 1
            ranges = [
                np.arange(start, min(stop, self.prompt_tokens)) for start, stop in item["ranges"]
            ]
            positions = np.concatenate(ranges) if ranges else np.arange(0)
            runs = tuple((int(f), int(r), int(c)) for f, r, c in item["runs"])
            if sum(f * r * c for f, r, c in runs) != positions.size:
                runs = ()
            found.append(Item(modality, counts[modality], positions, runs))
        return tuple(found)

    @cached_property
    def is_vision(self) -> np.ndarray:
        """bool [P]."""
        flags = np.zeros(self.prompt_tokens, dtype=bool)
        for item in self.items:
            flags[item.positions] = True
        return flags

    @cached_property
    def classes(self) -> tuple[HeadClass, ...]:
        """Static and dynamic heads, as far as there are any; none of a prompt that was not read."""
        found = []
        for name in CLASSES:
            num_heads = int(self.record["heads"].get(name, 0))
            if num_heads:
                counts = np.asarray(self.record["kept_counts"][name], dtype=np.int64)
                # what the counts do not reach was computed behind them, and every head has it
                share = np.ones(self.prompt_tokens)
                known = counts[: self.prompt_tokens]
                share[: known.size] = known / num_heads
                found.append(HeadClass(name, num_heads, share))
        return tuple(found)

    @property
    def share(self) -> np.ndarray:
        """float64 [P]: the share of all heads that kept each position."""
        total = np.zeros(self.prompt_tokens)
        for one in self.classes:
            total += one.share * one.num_heads
        return total / max(1, sum(one.num_heads for one in self.classes))

    @cached_property
    def is_static(self) -> np.ndarray:
        """bool [L, H], behind the prompt."""
        return np.asarray(self.record["static_heads"], dtype=bool).reshape(self.shape)

    @cached_property
    def held_tokens(self) -> np.ndarray:
        """int64 [L, H], behind the prompt."""
        return np.asarray(self.trace["held_tokens"], dtype=np.int64).reshape(self.shape)

    @cached_property
    def kept(self) -> np.ndarray | None:
        """bool [L, H, P], what each head kept; None where the trace does not say it."""
        packed = self.trace["kept"]
        return None if packed is None else unpacked_bits(packed, (*self.shape, self.prompt_tokens))

    @cached_property
    def steps(self) -> np.ndarray:
        """float64 [n, 4]: seconds, tokens seen, blocks held, head-pages in use."""
        return np.asarray(self.trace["steps"], dtype=np.float64).reshape(-1, 4)

    @cached_property
    def num_pages(self) -> np.ndarray:
        """float64 [n]: blocks that the head-pages in use would fill."""
        pages_per_block = self.record["block_tokens"] // self.record["page_tokens"]
        return self.steps[:, 3] / max(1, self.num_all_heads * pages_per_block)

    @cached_property
    def class_history(self) -> np.ndarray:
        """bool [compressions that are told of, L, H]: whether each head was static."""
        flags = [[one == "1" for one in bits] for _, _, bits in self.trace["classes"]]
        return np.asarray(flags, dtype=bool).reshape(-1, *self.shape)

    @cached_property
    def class_changes(self) -> np.ndarray:
        """int64 [L, H]: how often each head became one of the other class."""
        history = self.class_history
        return (history[1:] != history[:-1]).sum(axis=0)

    @property
    def tells_classes(self) -> bool:
        """Whether the policy tells heads apart: some were dynamic at any time."""
        return bool((~self.class_history).any())

    @property
    def prompt_seconds(self) -> float:
        """From its admission to the step that ended its prompt."""
        reached = self.steps[self.steps[:, 1] >= self.prompt_tokens]
        return float(reached[0, 0]) if len(reached) else float("nan")


def read_story(path: Path, request: str | None = None, skipped_bytes: int = 0) -> Story | None:
    """The last line of a trace file, or the last of a request.

    Args:
        path: the file.
        request: the id, as a client was told it.
        skipped_bytes: of the beginning of the file, that are older.

    Returns:
        None if there is no such line.

    Raises:
        OSError: there is no such file.
        ValueError: the line is no trace.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: name one that --kv-trace-file has written")
    with path.open("rb") as file:
        file.seek(skipped_bytes)
        # behind the last end of a line an engine may be writing
        whole, _, _ = file.read().rpartition(b"\n")
    lines = [line for line in whole.decode(errors="replace").splitlines() if line]
    for line in reversed(lines):
        story = Story.of_line(line)
        name = story.record["request_id"]
        # the engine appends a suffix of its own
        if request is None or name == request or name.startswith(f"{request}-"):
            return story
    return None
