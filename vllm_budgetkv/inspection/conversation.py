"""What a trace does not hold of a conversation: its pictures, its words and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL import Image

    from vllm_budgetkv.inspection.story import Item


@dataclass(frozen=True)
class Conversation:
    """Beside the story of a request.

    Args:
        model: its name or folder.
        pictures: RGB pictures of each item by modality, in the order of the prompt: of a video its
            frames, of an image itself. What is missing is not at hand.
        decode: text of token ids; None where no tokenizer is at hand.
        answer: None where it is not known.
        command: that shows this again; None for none.
    """

    model: str
    pictures: Mapping[str, Sequence[Sequence[Image.Image]]] = field(default_factory=dict)
    decode: Callable[[list[int]], str] | None = None
    answer: str | None = None
    command: str | None = None

    def pictures_of(self, item: Item) -> Sequence[Image.Image]:
        """Those of one item; none if they are not at hand."""
        of_kind = self.pictures.get(item.modality, ())
        return of_kind[item.number - 1] if item.number <= len(of_kind) else ()
