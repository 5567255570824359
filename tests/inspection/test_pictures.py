"""PNG files of a story: all that it has, and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.inspection.stories import Telling, long_telling, video
from tests.inspection.test_page import fits, full, one_class, small_telling, unread, without_bits
from vllm_budgetkv.inspection import pictures
from vllm_budgetkv.inspection.conversation import Conversation
from vllm_budgetkv.inspection.pictures import draw_all, require_matplotlib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_budgetkv.inspection.story import Story

ALL = ["kept.png", "text.png", "heads.png", "blocks.png"]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: small_telling().story(), ALL),
        (lambda: long_telling().story(), ALL),
        (one_class, ALL),
        (fits, ALL),
        (full, ALL),
        (without_bits, ALL),
        (unread, ["blocks.png"]),
    ],
    ids=["small", "long", "one-class", "fits", "full", "without-bits", "unread"],
)
def test_what_is_drawn(make: Callable[[], Story], names: list[str], tmp_path: Path) -> None:
    def decode(token_ids: list[int]) -> str:
        return "".join(f" $w{one}$\n" if one % 9 == 0 else " €" for one in token_ids)

    written = draw_all(make(), Conversation("model", decode=decode), tmp_path)
    assert [path.name for path in written] == names
    for path in written:
        with Image.open(path) as found:
            assert found.format == "PNG" and found.width == 1760 and 120 < found.height < 4000
            assert len(np.unique(np.asarray(found.convert("L")))) > 20, f"{path.name} is empty"


def test_the_same_story_is_drawn_alike(tmp_path: Path) -> None:
    kept = np.zeros((1, 2, 40), dtype=bool)
    telling = Telling(kept, np.array([[True, False]]), [video(4, 4, 2, 2)])
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = draw_all(telling.story(), Conversation("m"), tmp_path / name)
        found.append([path.read_bytes() for path in files])
    assert found[0] == found[1]


def test_without_matplotlib_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-budgetkv\[plots\]'"):
        require_matplotlib()
