"""Turns conversations into tensors: token ids, M-RoPE positions, cells, the answers to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.quality.conversations import VIDEO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from benchmarks.quality.conversations import Conversation

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Tensors of B conversations, padded on the right to n tokens.

    Attributes:
        input_ids: int64 [B, n].
        position_ids: int64 [3, B, n].
        labels: int64 [B, n]; the token that follows each place, `IGNORE` outside the answers.
        turns: int64 [B, n], which turn of its conversation a label answers; -1 within its content.
        cells: int64 [V], cell id of every vision token, in the order of `is_vision`.
        is_vision: bool [B, n].
        grid: (rows, columns) of cells of every frame.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    turns: torch.Tensor
    cells: torch.Tensor
    is_vision: torch.Tensor
    grid: tuple[int, int]


class Collator:
    """Encodes conversations with the model's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        to_id = tokenizer.convert_tokens_to_ids
        self._video, self._stop = to_id("<|video_pad|>"), to_id("<|im_end|>")
        self._start = to_id("<|im_start|>")
        self._pad = tokenizer.pad_token_id
        template = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)
        self._assistant = template["input_ids"]

    def text(self, talk: Conversation) -> str:
        """The conversation as the chat template writes it."""
        messages = []
        for index, (question, answer) in enumerate(talk.turns):
            content = talk.content + question if index == 0 else question
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
        return self._tokenizer.apply_chat_template(messages, tokenize=False)

    def __call__(self, talks: Sequence[Conversation]) -> Batch:
        """All scenes of a batch have frames of one size.

        Raises:
            ValueError: they have not.
        """
        grids = {scene.shape[1:] for talk in talks for scene in talk.scenes}
        if len(grids) != 1:
            raise ValueError(f"a batch needs frames of one size, not {sorted(grids)}")
        texts = [self.text(talk) for talk in talks]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = [
            self._row(np.array(ids), talk, learnt_tokens(text, spans, talk))
            for text, ids, spans, talk in zip(
                texts, encoded["input_ids"], encoded["offset_mapping"], talks, strict=True
            )
        ]
        length = max(len(row[0]) for row in rows)
        shape = (len(rows), length)
        ids, labels = np.full(shape, self._pad), np.full(shape, IGNORE)
        positions, turns = np.zeros((3, *shape), dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for index, (row_ids, row_positions, row_labels) in enumerate(rows):
            stop = len(row_ids)
            ids[index, :stop], labels[index, :stop] = row_ids, row_labels
            turns[index, :stop] = (np.cumsum(row_ids == self._start) - 3) // 2
            positions[:, index, :stop] = row_positions
        cells = np.concatenate([scene.ravel() for talk in talks for scene in talk.scenes])
        input_ids = torch.from_numpy(ids)
        return Batch(
            input_ids=input_ids,
            position_ids=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            turns=torch.from_numpy(turns),
            cells=torch.from_numpy(cells),
            is_vision=input_ids == self._video,
            grid=grids.pop(),
        )

    def _row(
        self, ids: np.ndarray, talk: Conversation, learnt: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids [n], positions [3, n], labels [n]) of one conversation; `learnt` indexes its ids."""
        sizes = np.ones(len(ids), dtype=np.int64)
        sizes[ids == self._video] = [scene.size for scene in talk.scenes]
        expanded = np.repeat(ids, sizes)
        positions = np.empty((3, len(expanded)), dtype=np.int64)
        start = place = 0
        for marker, scene in zip(np.flatnonzero(ids == self._video), talk.scenes, strict=True):
            text = marker - start
            positions[:, place : place + text] = np.arange(text) + self._next(positions, place)
            place += text
            first = self._next(positions, place)
            grid = np.indices(scene.shape).reshape(3, -1)
            positions[:, place : place + scene.size] = grid + first
            place += scene.size
            start = marker + 1
        rest = len(expanded) - place
        positions[:, place:] = np.arange(rest) + self._next(positions, place)
        labels = self._labels(expanded)
        places = (np.cumsum(sizes) - sizes)[learnt]
        labels[places - 1] = expanded[places]
        return expanded, positions, labels

    @staticmethod
    def _next(positions: np.ndarray, place: int) -> int:
        """Position behind the first `place` tokens: one beyond the largest of their last item."""
        if place == 0:
            return 0
        return int(positions[:, max(0, place - 4096) : place].max()) + 1

    def _labels(self, ids: np.ndarray) -> np.ndarray:
        labels = np.full(len(ids), IGNORE)
        width = len(self._assistant)
        windows = np.lib.stride_tricks.sliding_window_view(ids, width)
        for start in np.flatnonzero((windows == self._assistant).all(axis=1)):
            first = start + width
            stop = first + int(np.argmax(ids[first:] == self._stop))
            labels[first - 1 : stop] = ids[first : stop + 1]
        return labels


def learnt_tokens(text: str, spans: Sequence[tuple[int, int]], talk: Conversation) -> np.ndarray:
    """Indices of the tokens of `Conversation.learnt`, int [m].

    Args:
        text: the conversation as the model reads it.
        spans: first character and end of every token.
        talk: whose content stands in `text`.
    """
    start = text.index(talk.content)
    stops = [stop for _, stop in spans]
    return np.unique(np.searchsorted(stops, np.array(talk.learnt, dtype=int) + start, "right"))


__all__ = ["VIDEO", "Batch", "Collator"]
