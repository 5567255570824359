"""The page: what it says is what the story says, it holds all it needs, and it stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.inspection.stories import Telling, image, long_telling, video
from vllm_budgetkv.inspection.charts import (
    HEIGHT,
    WIDTH,
    area_path,
    binned,
    class_rows,
    kept_rows,
    step_path,
    zones,
)
from vllm_budgetkv.inspection.conversation import Conversation
from vllm_budgetkv.inspection.page import render
from vllm_budgetkv.inspection.story import Story

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'words'"
IS_STATIC = np.array([[True, False], [False, False]])
# elements without an end
VOID = {"meta", "img", "br", "path", "rect", "i"}


class Reader(HTMLParser):
    """What a browser would see: elements, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[dict[str, Any], str]] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][1] if self.elements else {}, data))

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [found for name, found in self.elements if name == tag]

    def words(self) -> list[tuple[str, str]]:
        """Text and class of each word of the prompt."""
        return [(data, a["class"]) for a, data in self.texts if a.get("class", "").startswith("w ")]

    @property
    def text(self) -> str:
        return " ".join("".join(data for _, data in self.texts).split())


def small_telling() -> Telling:
    """Four words, a video of two frames of four patches, two words."""
    kept = np.zeros((2, 2, 14), dtype=bool)
    kept[..., :2] = True
    kept[0, 0, 4:8] = True
    kept[1, :, 13] = True
    return Telling(kept, IS_STATIC, [video(4, 2, 2, 2)])


def page_of(telling: Telling | Story, **conversation: Any) -> str:
    story = telling.story() if isinstance(telling, Telling) else telling
    return render(story, Conversation("model", **conversation))


def numbers_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_words_are_marked_by_what_each_class_kept() -> None:
    page = page_of(small_telling(), decode=lambda ids: "".join(f" w{one}" for one in ids))
    words = {text.strip(): marks.split() for text, marks in Reader(page).words()}
    assert words["w0"] == ["w", "s8", "d8"] and words["w1"] == ["w", "s8", "d8"]
    assert words["w2"] == ["w", "gone"] and words["w3"] == ["w", "gone"]
    assert words["w12"] == ["w", "gone"]
    # the static head did not keep it, two of three dynamic ones did
    assert words["w13"] == ["w", "d6"]
    assert "video 1, 8 tokens" in Reader(page).text


def test_frames_are_lit_for_each_class() -> None:
    frames = [Image.new("RGB", (28, 28), (200, 40, 40))] * 4
    page = Reader(page_of(small_telling(), pictures={"video": [frames]}))
    tiles = [found["alt"] for found in page.all("img") if "heads kept" in found["alt"]]
    assert tiles == [
        f"video 1, frame {frame}: {name} heads kept {kept} of its patches"
        for name, kept_of in (("static", ("100%", "0%")), ("dynamic", ("0%", "0%")))
        for frame, kept in zip((1, 2), kept_of, strict=True)
    ]


def test_numbers_are_those_of_the_record() -> None:
    telling = small_telling()
    numbers, record = numbers_in(page_of(telling)), telling.record()
    for name in ("request_id", "policy", "prompt_tokens", "peak_blocks", "full_cache_blocks"):
        assert numbers[name] == record[name]
    assert numbers["text_tokens"] == 6 and numbers["vision_tokens"] == 8
    assert numbers["heads"] == {"static": 1, "dynamic": 3}
    assert numbers["kept_tokens_per_head"] == {
        "static": {"text": 2, "vision": 4},
        "dynamic": {"text": round((2 + 2 + 2 + 2) / 3, 1), "vision": 0},
    }
    text = Reader(page_of(telling)).text
    assert "quota 8, of 16 tokens" in text and "6 text, 8 vision" in text


@pytest.mark.parametrize("place", ["words", "model", "answer", "command", "request", "item"])
def test_no_text_becomes_markup(place: str) -> None:
    telling = small_telling()
    record, trace = telling.record(), telling.trace()
    conversation: dict[str, Any] = {"model": "model"}
    if place == "words":
        conversation["decode"] = lambda ids: EVIL * len(ids)
    elif place == "request":
        record["request_id"] = EVIL
    elif place == "item":
        trace["items"][0]["modality"] = EVIL
        conversation["pictures"] = {EVIL: [[Image.new("RGB", (8, 8))]]}
    else:
        conversation[place] = EVIL
    page = render(Story(record, trace), Conversation(**conversation))
    reader = Reader(page)
    assert [found["type"] for found in reader.all("script")] == ["application/json"]
    assert all("onerror" not in found for _, found in reader.elements)
    assert EVIL in "".join(data for _, data in reader.texts) or place == "item"
    assert numbers_in(page)["request_id"] == record["request_id"]


def test_it_holds_all_that_it_needs() -> None:
    frames = [Image.new("RGB", (28, 28))] * 4
    page = page_of(small_telling(), pictures={"video": [frames]}, answer="x")
    reader = Reader(page)
    for _, found in reader.elements:
        for name in ("src", "href", "srcset", "data"):
            assert str(found.get(name, "data:")).startswith("data:")
    assert "url(" not in page and "@import" not in page
    (policy,) = [m["content"] for m in reader.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(found["alt"] for found in reader.all("img"))
    assert all(found["aria-label"] for found in reader.all("svg"))


def test_a_long_conversation_stays_small_and_says_what_is_left_out() -> None:
    """32,000 tokens, 400 frames with time stamps, 288 heads, 31 compressions."""
    frames = [Image.effect_noise((320, 200), 60).convert("RGB")] * 800
    pictures = {"video": [frames], "image": [[Image.new("RGB", (900, 600))]]}
    page = page_of(long_telling(), pictures=pictures, decode=lambda ids: " word" * len(ids))
    assert len(page.encode()) < 1_500_000
    reader = Reader(page)
    assert len(reader.all("span")) < 4000 and len(reader.all("img")) < 100
    assert "Shown: 24 frames, half of them evenly spread" in reader.text
    assert "in 400 frames, 5 × 8 patches each" in reader.text
    assert re.search(r"left out: 2\d,\d{3} tokens", reader.text)
    assert "means of 100 neighbours" in reader.text


def test_many_items_are_counted() -> None:
    kept = np.zeros((2, 2, 300), dtype=bool)
    items = [image(10 * number + 5, (1, 2, 2)) for number in range(20)]
    text = Reader(page_of(Telling(kept, IS_STATIC, items))).text
    assert "Image 12" in text and "Image 13" not in text
    assert "8 more pictures and videos are not shown" in text


def test_an_item_whose_patches_stand_nobody_knows_how() -> None:
    kept = np.zeros((2, 2, 30), dtype=bool)
    telling = Telling(kept, IS_STATIC, [image(5, num_tokens=9)])
    reader = Reader(page_of(telling, pictures={"image": [[Image.new("RGB", (50, 50))]]}))
    assert "how its patches stand is not known" in reader.text
    assert "image 1 as it was sent" in [found["alt"] for found in reader.all("img")]


def one_class() -> Story:
    """As under a policy that tells no heads apart."""
    flags = np.ones((2, 2), dtype=bool)
    return Telling(np.ones((2, 2, 20), dtype=bool), flags, policy="window").story()


def fits() -> Story:
    found = Telling(np.ones((2, 2, 20), dtype=bool), np.ones((2, 2), dtype=bool))
    return Story(found.record() | {"compressions": 0}, found.trace() | {"classes": []})


def unread() -> Story:
    found = small_telling()
    record = found.record() | {"heads": {}, "kept": {}, "kept_counts": {}, "static_heads": []}
    nothing = {"held_tokens": [], "kept": None, "classes": [], "steps": [[0.1, 4, 8, 3]]}
    return Story(record, found.trace() | nothing)


def without_bits() -> Story:
    found = small_telling()
    return Story(found.record(), found.trace() | {"kept": None})


def full() -> Story:
    found = Telling(np.ones((2, 2, 20), dtype=bool), np.ones((2, 2), dtype=bool), policy="full")
    return Story(found.record() | {"compressions": 0}, found.trace() | {"classes": []})


@pytest.mark.parametrize(
    ("make", "said", "unsaid"),
    [
        (one_class, "this policy knows one class only", "static heads"),
        (fits, "Prompt and answer fit the quota", "compression 1"),
        (unread, "ended before its prompt was read", "Its text"),
        (without_bits, "is not in the trace: the prompt is too long", "What each head kept behind"),
        (full, "no quota", "quota 8"),
    ],
)
def test_what_there_is_not_is_not_shown(make: Any, said: str, unsaid: str) -> None:
    text = Reader(page_of(make())).text
    assert said in text and unsaid not in text


def test_bins_are_means() -> None:
    assert binned(np.arange(6.0), 3).tolist() == [0.5, 2.5, 4.5]
    assert binned(np.arange(3.0), 3).tolist() == [0, 1, 2]
    assert binned(np.ones(1000), 7).tolist() == [1] * 7
    assert zones(np.array([True, True, False, False, True])) == [(0, 40), (80, 20)]


def test_paths_end_where_the_drawing_does() -> None:
    assert area_path(np.array([0.0, 1.0]), 2.0) == "M0 100V100.0H500.0V50.0H1000.0V100Z"
    x, y = np.array([0.0, 1.0]), np.array([2.0, 8.0])
    assert step_path(x, y, 4.0, 4.0, filled=False) == "M0.0 50.0H250.0V0.0H1000"
    assert step_path(x, y, 4.0, 4.0, filled=True) == "M0.0 100V50.0H250.0V0.0H1000V100Z"
    assert step_path(x[:0], y[:0], 4.0, 4.0, filled=True) == ""
    assert (WIDTH, HEIGHT) == (1000, 100), "the template says so too"


def test_rows_of_heads_are_classes_and_what_was_kept() -> None:
    story = small_telling().story()
    classes = np.asarray(class_rows(story))
    assert classes.shape == (4, 2, 3)
    assert (classes[0] == classes[0, 0]).all() and (classes[1:] != classes[0, 0]).any()
    kept = kept_rows(story)
    assert kept is not None
    opacity = np.asarray(kept)[..., 3]
    assert story.kept is not None
    assert np.array_equal(opacity == 255, story.kept.reshape(4, -1))
    assert np.array_equal(opacity == 0, ~story.kept.reshape(4, -1))
