"""Words on frames: which tokens can be drawn, and how a frame of 4 x 4 of them looks.

A frame is a picture of 128 x 128 pixels. Each of its 16 cells shows one token of the language model
in bright letters of a colour of its own, before scenery that is darker and changes from frame to
frame. Letters stand at fixed places of their cell, at most six in a line. What cannot be seen of a
token is written: a middle dot stands before letters that continue a word, an open box is a space.
An empty cell is a line break.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.real import prose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.ImageFont import FreeTypeFont
    from transformers import PreTrainedTokenizerBase

CELL_PIXELS = 32
CELLS_PER_SIDE = 4
CELLS = CELLS_PER_SIDE**2
FRAME_PIXELS = CELL_PIXELS * CELLS_PER_SIDE
FONT, FONT_PIXELS = "DejaVuSansMono-Bold.ttf", 8
LINE_LETTERS, LONGEST = 6, 12
PROSE_TOKENS, NUM_KEYS = 1000, 200
CONTINUES, SPACE, BREAK = "\N{MIDDLE DOT}", "\N{OPEN BOX}", "\n"
ALIKE = "O"  # looks like a zero
# brightness of scenery and of letters
DARKEST, BRIGHTEST = 60, 200
# what sentences of the tasks are made of besides keys and prose
TEMPLATES = (
    "One of the special magic numbers for is: 0123456789.",
    "The number 0123456789 is the special magic number for.",
)


@dataclass(frozen=True)
class Vocabulary:
    """The V tokens that frames show.

    Attributes:
        ids: of the language model, in ascending order.
        labels: what is drawn for each.
        keys: single words that needles are about; each is one token behind a space.
    """

    ids: tuple[int, ...]
    labels: tuple[str, ...]
    keys: tuple[str, ...]

    @cached_property
    def index(self) -> dict[int, int]:
        """Row of each token."""
        return {token: row for row, token in enumerate(self.ids)}

    @cached_property
    def masks(self) -> np.ndarray:
        """float32 [V, CELL_PIXELS, CELL_PIXELS]: how much of a pixel is letter, 0 to 1."""
        return np.stack([_mask(label) for label in self.labels]).astype(np.float32) / 255


@cache
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The most frequent tokens of the prose, those of the tasks' sentences, and the keys."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    counts = Counter(token for block in prose.paragraphs() for token in tokens(" " + block))
    often = [token for token, _ in counts.most_common(PROSE_TOKENS)]
    nouns = [word for word in prose.words("noun") if len(word) in range(4, 9)]
    single = [word for word in nouns if len(tokens(" " + word)) == 1]
    keys = single[:: len(single) // NUM_KEYS][:NUM_KEYS]
    fixed = [token for text in TEMPLATES for token in tokens(" " + text)]
    asked = [tokens(" " + key)[0] for key in keys]
    found = {token: label_of(tokenizer.decode([token])) for token in [*often, *fixed, *asked]}
    drawn = {token: label for token, label in found.items() if label is not None}
    drawn |= dict.fromkeys(tokens(BREAK), "")
    ids = tuple(sorted(drawn))
    return Vocabulary(ids, tuple(drawn[token] for token in ids), tuple(keys))


def label_of(text: str) -> str | None:
    """What is drawn for the text of a token; None where it is no word, number or sign that fits."""
    found = re.fullmatch(r"( ?)([A-Za-z]+|[0-9]|[,.;:?!'\"-]+[a-z]*|)", text)
    if found is None or not text or text.strip() == ALIKE:
        return None
    space, rest = found.groups()
    if not rest:
        return SPACE
    word = rest[0].isalpha()
    mark = "" if bool(space) == word else CONTINUES if word else SPACE
    return mark + rest if len(mark + rest) <= LONGEST else None


def _mask(label: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("L", (CELL_PIXELS, CELL_PIXELS))
    lines = [label[:LINE_LETTERS], label[LINE_LETTERS:]]
    for line, middle in zip(lines, (CELL_PIXELS // 4, 3 * CELL_PIXELS // 4), strict=True):
        ImageDraw.Draw(image).text((1, middle), line, fill=255, font=_font(), anchor="lm")
    return np.asarray(image)


@cache
def _font() -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{FONT}", FONT_PIXELS)


def draw_frames(rows: np.ndarray, words: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Frames that show tokens, each before scenery of its own.

    Args:
        rows: int [F, CELLS], rows of the vocabulary, read like a text.
        words: what they mean.
        rng: colours and scenery.

    Returns:
        uint8 [F, FRAME_PIXELS, FRAME_PIXELS, 3].
    """
    frames = np.stack([scenery(rng) for _ in rows])
    colours = rng.integers(BRIGHTEST, 256, (*rows.shape, 3))
    np.put_along_axis(colours, rng.integers(3, size=(*rows.shape, 1)), 255, axis=-1)
    for frame, cell in np.ndindex(*rows.shape):
        y, x = (slice(at, at + CELL_PIXELS) for at in corner(cell))
        covered = words.masks[rows[frame, cell]][:, :, None]
        behind = frames[frame, y, x].astype(np.float32)
        frames[frame, y, x] = behind + covered * (colours[frame, cell] - behind)
    return frames


def corner(cell: int) -> tuple[int, int]:
    """Its first pixel, from the top and from the left."""
    down, right = divmod(cell, CELLS_PER_SIDE)
    return down * CELL_PIXELS, right * CELL_PIXELS


def scenery(rng: np.random.Generator) -> np.ndarray:
    """A dark scene: slow gradients, and a few boxes. uint8 [FRAME_PIXELS, FRAME_PIXELS, 3]."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, DARKEST, (5, 5, 3), dtype=np.uint8))
    scene = np.array(coarse.resize((FRAME_PIXELS, FRAME_PIXELS), Image.Resampling.BILINEAR))
    for _ in range(4):
        top, left = rng.integers(FRAME_PIXELS - 10, size=2)
        high, wide = rng.integers(5, 60, size=2)
        scene[top : top + high, left : left + wide] = rng.integers(0, DARKEST, 3)
    return scene


def cells_of(tokens: Sequence[int], words: Vocabulary, blank: int) -> np.ndarray:
    """Rows of the vocabulary for a text, int [F, CELLS]; the last frame is filled with `blank`.

    Raises:
        KeyError: a token cannot be drawn.
    """
    filled = [*tokens, *[blank] * (-len(tokens) % CELLS)]
    return np.array([words.index[token] for token in filled]).reshape(-1, CELLS)
