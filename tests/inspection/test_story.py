"""A line of a trace becomes arrays: each position is where the prompt has it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.inspection.stories import PAGE_TOKENS, Telling, image, video
from vllm_budgetkv.inspection.numbers import numbers_of
from vllm_budgetkv.inspection.story import Story, read_story

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (2, 2)
IS_STATIC = np.array([[True, False], [False, False]])


def telling(prompt_tokens: int, items: list[dict[str, Any]], **fields: Any) -> Telling:
    kept = np.zeros((*SHAPE, prompt_tokens), dtype=bool)
    return Telling(kept, IS_STATIC, items, **fields)


def test_frames_stand_between_their_time_stamps() -> None:
    story = telling(60, [video(10, 3, 2, 3, stamp_tokens=4)]).story()
    (item,) = story.items
    assert item.name == "video 1" and item.num_frames == 3
    assert item.frame_positions[0].tolist() == [[14, 15, 16], [17, 18, 19]]
    assert item.frame_positions[2].tolist() == [[34, 35, 36], [37, 38, 39]]
    assert np.flatnonzero(story.is_vision).tolist() == [
        *range(14, 20),
        *range(24, 30),
        *range(34, 40),
    ]


def test_frames_of_two_sizes() -> None:
    (item,) = telling(40, [image(5, (2, 1, 3), (1, 2, 2))]).story().items
    assert [one.tolist() for one in item.frame_positions] == [
        [[5, 6, 7]],
        [[8, 9, 10]],
        [[11, 12], [13, 14]],
    ]


@pytest.mark.parametrize(
    "item",
    [image(5, num_tokens=7), image(5, (1, 2, 2)) | {"ranges": [[5, 8]]}],
    ids=["no-grid", "cut"],
)
def test_an_item_without_known_frames_has_positions_only(item: dict[str, Any]) -> None:
    """A grid that its tokens do not fill would light the wrong patches."""
    (found,) = telling(40, [item]).story().items
    assert found.num_frames == 0 and found.frame_positions == []
    assert found.positions.tolist() == list(range(*item["ranges"][0]))


def test_items_are_numbered_by_kind() -> None:
    items = [image(2, num_tokens=3), video(6, 1, 2, 2), image(12, num_tokens=3)]
    names = [item.name for item in telling(40, items).story().items]
    assert names == ["image 1", "video 1", "image 2"]


def test_shares_are_counts_over_heads() -> None:
    found = telling(6, [])
    found.kept[0, 0, 1] = found.kept[0, 1, 2] = found.kept[1, 1, 2] = found.kept[1, 0, 5] = True
    story = found.story()
    static, dynamic = story.classes
    assert (static.name, static.num_heads) == ("static", 1)
    assert (dynamic.name, dynamic.num_heads) == ("dynamic", 3)
    assert static.share.tolist() == [0, 1, 0, 0, 0, 0]
    assert dynamic.share.tolist() == pytest.approx([0, 0, 2 / 3, 0, 0, 1 / 3])
    assert story.share.tolist() == [0, 1 / 4, 2 / 4, 0, 0, 1 / 4]
    assert story.kept is not None and np.array_equal(story.kept, found.kept)
    assert story.held_tokens.tolist() == [[1, 1], [1, 1]]


def test_what_was_computed_behind_the_counts_is_held() -> None:
    """With recall the last token of the prompt is a step of its own; output may be counted too."""
    found = telling(6, [])
    for length, expected in ((5, [0, 0, 0, 0, 0, 1]), (8, [0] * 6)):
        record = found.record()
        record["kept_counts"] = {name: [0] * length for name in ("static", "dynamic")}
        story = Story(record, found.trace())
        assert story.classes[0].share.tolist() == expected


def test_changes_of_class_are_counted_for_each_head() -> None:
    history = np.stack([IS_STATIC, ~IS_STATIC, IS_STATIC, IS_STATIC])
    history[:, 1, 1] = False
    story = telling(6, [], history=history).story()
    assert story.class_changes.tolist() == [[2, 2], [2, 0]]
    assert story.tells_classes
    one_class = telling(6, [], history=np.ones((3, *SHAPE), dtype=bool)).story()
    assert not one_class.tells_classes


def test_seconds_of_the_prompt() -> None:
    assert telling(64, []).story().prompt_seconds == pytest.approx(1.0)
    trace = telling(64, []).trace() | {
        "steps": [[0.5, 16, 8, 3], [0.6, 16, 0, 0]],
        "held_tokens": [],
    }
    record = telling(64, []).record() | {"heads": {}, "kept": {}, "kept_counts": {}}
    story = Story(record, trace)
    assert np.isnan(story.prompt_seconds) and not story.is_read and not story.classes


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"record": {}}',
        json.dumps({"record": {"heads": {}}, "trace": {"items": 5, "prompt_tokens": 3}}),
    ],
)
def test_what_is_no_trace_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no trace of --kv-trace-file"):
        Story.of_line(line)


def test_the_last_line_or_that_of_a_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = []
    for name in ("a-1", "b-1", "a-2"):
        found = telling(6, [])
        line = {"record": found.record() | {"request_id": name}, "trace": found.trace()}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))

    def name_of(request: str | None, skipped_bytes: int = 0) -> str | None:
        story = read_story(path, request, skipped_bytes)
        return None if story is None else story.record["request_id"]

    assert name_of(None) == "a-2" and name_of("b") == "b-1" and name_of("c") is None
    # another request whose id begins alike, and a line that an engine is writing
    with path.open("a") as file:
        file.write(lines[0].replace('"a-1"', '"ab-1"') + lines[0][:50])
    assert name_of("a") == "a-2" and name_of(None) == "ab-1"
    assert name_of("b", skipped_bytes=len(lines[0]) + len(lines[1])) is None


def test_blocks_of_several_pages() -> None:
    """As in models with recurrent layers: what is used is never more than what is held."""
    story = telling(640, [], pages_per_block=8).story()
    used, held = story.num_pages[:10], story.steps[:10, 2]
    assert used == pytest.approx(0.75 * held)
    numbers = numbers_of(story)
    assert numbers["block_tokens"] == 8 * PAGE_TOKENS
    assert numbers["full_cache_blocks"] == -(-642 // (8 * PAGE_TOKENS))
