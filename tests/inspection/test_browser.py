"""The page in a real headless Chromium, as wide as a desk's and as a phone's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.inspection.chromium import Browser, running
from tests.inspection.stories import Telling, long_telling, video
from tests.inspection.test_page import EVIL
from vllm_budgetkv.inspection.conversation import Conversation
from vllm_budgetkv.inspection.page import render

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DESK_PIXELS, PHONE_PIXELS = 1280, 390
# parts that stand out of the page, but for those inside what scrolls by itself
TOO_WIDE = """
[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll') &&
  one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(one => one.outerHTML.slice(0, 120))
"""
# WCAG 2: the least contrast of small text to what stands behind it
LEAST_CONTRAST = 4.5
CONTRASTS = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const found = rgb(getComputedStyle(one).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll('main *')]
    .filter(one => [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(one => {
      const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), one.className || one.tagName];
    }).sort((a, b) => a[0] - b[0])[0];
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def write(folder: Path, telling: Telling, text: str) -> Path:
    frames = [Image.effect_noise((160, 90), 60).convert("RGB")] * 8
    pictures = {"video": [frames], "image": [[Image.new("RGB", (900, 600))]]}
    conversation = Conversation(
        "organisation/" + "a-very-long-name-" * 8,
        pictures,
        lambda ids: text * len(ids),
        answer=text * 20,
        command="vllm-budgetkv inspect --question " + "x" * 400,
    )
    page = folder / "page.html"
    page.write_text(render(telling.story(), conversation), encoding="utf-8")
    return page


def small() -> Telling:
    kept = np.random.default_rng(0).random((2, 2, 80)) < 0.3
    is_static = np.array([[True, False], [False, True]])
    return Telling(kept, is_static, [video(6, 4, 2, 3, stamp_tokens=2)])


@pytest.fixture(scope="module", params=["small", "long", "one-long-word"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    telling = long_telling() if request.param == "long" else small()
    text = "Unbreakable" * 40 if request.param == "one-long-word" else f" {EVIL}\n"
    return write(tmp_path_factory.mktemp(request.param), telling, text)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK_PIXELS, PHONE_PIXELS])
def test_nothing_stands_out_of_the_page(
    browser: Browser, page: Path, width: int, is_dark: bool
) -> None:
    browser.open(page, width, is_dark=is_dark)
    assert browser.value("document.documentElement.clientWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(TOO_WIDE) == []
    assert browser.requested() == [page.as_uri()], "it asks for nothing"
    assert not [event for event in browser.events if event.get("method") == "Log.entryAdded"]
    assert browser.value("document.querySelectorAll('script').length") == 1
    assert browser.value("[...document.images].every(one => one.naturalWidth > 0)")
    contrast, where = browser.value(CONTRASTS)
    assert contrast >= LEAST_CONTRAST, where


@pytest.mark.parametrize("width", [DESK_PIXELS, PHONE_PIXELS])
def test_a_screenshot_has_all_of_it(
    browser: Browser, page: Path, tmp_path: Path, width: int
) -> None:
    browser.open(page, width)
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as found:
        assert found.size == (width, browser.value("document.documentElement.scrollHeight"))
        pixels = np.asarray(found.convert("L"))
    # every part of the page has something in it
    assert (np.array([part.std() for part in np.array_split(pixels, 8)]) > 1).all()


def test_colours_follow_the_system(browser: Browser, page: Path) -> None:
    found = []
    for is_dark in (False, True):
        browser.open(page, DESK_PIXELS, is_dark=is_dark)
        found.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert found == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]
