"""Lit frames: the patches of kept positions, and no others, in the picture they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.inspection.stories import Telling, image, video
from vllm_budgetkv.inspection.tiles import (
    SMALL_PIXELS,
    UNLIT,
    chosen_frames,
    frame_shares,
    light_of,
    lit_picture,
    source_of,
    tiles_of,
)

RED = (200, 40, 40)


def story_of(kept_positions: list[int], items: list[dict], prompt_tokens: int = 80) -> Telling:
    kept = np.zeros((1, 2, prompt_tokens), dtype=bool)
    kept[0, :, kept_positions] = True
    return Telling(kept, np.array([[True, False]]), items)


def lit_patches(picture: Image.Image, rows: int, columns: int) -> list[tuple[int, int]]:
    """Patches whose middle is as red as the picture was."""
    pixels = np.asarray(picture).astype(int)
    height, width = pixels.shape[:2]
    return [
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if np.abs(
            pixels[(2 * row + 1) * height // (2 * rows), (2 * column + 1) * width // (2 * columns)]
            - RED
        ).max()
        < 2
    ]


@pytest.mark.parametrize("stamp_tokens", [0, 5])
def test_a_kept_position_lights_its_patch(stamp_tokens: int) -> None:
    """Frame 2 of 3, patch (1, 2) of 2 x 4, with and without the text of time stamps between."""
    item = video(3, 3, 2, 4, stamp_tokens=stamp_tokens)
    start = 3 + 2 * (8 + stamp_tokens) + stamp_tokens
    story = story_of([start + 6], [item]).story()
    (found,) = story.items
    pictures = [Image.new("RGB", (64, 32), RED)] * 6
    tiles = tiles_of(found, story.classes[0], [0, 1, 2], pictures, 1.0)
    lit = [lit_patches(tile.picture, 2, 4) for tile in tiles]
    assert lit == [[], [], [(1, 2)]]
    assert [tile.kept_ratio for tile in tiles] == [0, 0, 1 / 8]
    assert [tile.source for tile in tiles] == [0, 2, 4]


def test_merged_patches_divide_the_picture_evenly() -> None:
    story = story_of([4, 9], [image(4, (1, 2, 3))]).story()
    picture = Image.new("RGB", (90, 90), RED)
    (tile,) = tiles_of(story.items[0], story.classes[0], [0], [picture], 1.0)
    assert lit_patches(tile.picture, 2, 3) == [(0, 0), (1, 2)]


def test_what_no_head_kept_is_dark_and_grey() -> None:
    share = np.array([[0.0, 0.5, 1.0]])
    pixels = np.asarray(lit_picture(Image.new("RGB", (30, 10), RED), share, 1.0)).astype(int)
    dark, half, full = pixels[5, 5], pixels[5, 15], pixels[5, 25]
    grey = int(Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0)))
    assert dark.tolist() == [round(UNLIT * grey)] * 3
    assert full.tolist() == list(RED)
    assert dark[0] < half[0] < full[0] and half[0] > half[1]


def test_light_grows_with_the_share_up_to_the_brightest() -> None:
    light = light_of(np.array([0, 0.1, 0.2, 0.4, 0.9]), 0.4)
    assert light[0] == UNLIT and light[3] == light[4] == 1
    assert (np.diff(light[:4]) > 0).all()
    assert light_of(np.zeros(2), 0.0).tolist() == [UNLIT, UNLIT]


def test_frames_are_those_evenly_spread_and_those_that_kept_most() -> None:
    kept = [frame * 4 for frame in (7, 31, 55)]
    story = story_of(kept, [video(0, 60, 2, 2)], 240).story()
    (item,) = story.items
    chosen = chosen_frames(item, story.share, 10)
    assert len(chosen) == 10 and chosen == sorted(chosen)
    assert {7, 31, 55} <= set(chosen) and {0, 59} <= set(chosen)
    assert chosen_frames(item, story.share, 60) == list(range(60))


@pytest.mark.parametrize(
    ("num_frames", "num_pictures", "expected"),
    [(4, 4, [0, 1, 2, 3]), (3, 6, [0, 2, 4]), (4, 7, [0, 1, 3, 5]), (2, 1, [0, 0])],
    ids=["one-each", "two-each", "padded", "picture-that-became-two"],
)
def test_the_picture_of_a_frame(num_frames: int, num_pictures: int, expected: list[int]) -> None:
    assert [source_of(f, num_frames, num_pictures) for f in range(num_frames)] == expected


def test_a_frame_whose_picture_is_not_at_hand() -> None:
    story = story_of([0], [image(0, (1, 2, 3))]).story()
    (tile,) = tiles_of(story.items[0], story.classes[0], [0], [], 1.0)
    assert tile.source is None and tile.picture.size == (42, 28)
    pixels = np.asarray(tile.picture)
    assert pixels[3, 3].min() > pixels[3, 20].max()


def test_pictures_are_made_small_and_not_large() -> None:
    story = story_of([0], [video(0, 8, 2, 3)]).story()
    for size in ((1920, 1080), (20, 10)):
        pictures = [Image.new("L", size)] * 8
        tiles = tiles_of(story.items[0], story.classes[0], range(8), pictures, 1.0)
        assert max(tiles[0].picture.size) == min(SMALL_PIXELS, max(size))
        assert pictures[0].size == size


def test_shares_stand_as_the_patches_do() -> None:
    story = story_of([1, 5], [image(0, (1, 2, 3))]).story()
    (share,) = frame_shares(story.items[0], story.classes[1])
    assert share.tolist() == [[0, 1, 0], [0, 0, 1]]
