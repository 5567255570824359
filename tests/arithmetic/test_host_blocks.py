"""Blocks of host memory under random verbs: nothing is lost, nothing that is held is taken."""

from __future__ import annotations

import random

import pytest

from vllm_budgetkv.arithmetic.host_blocks import HostBlocks


@pytest.mark.parametrize("seed", range(40))
def test_random_verbs(seed: int) -> None:
    chance, blocks = random.Random(seed), HostBlocks(12)
    holders: list[list[int]] = []
    content: dict[str, int] = {}
    for number in range(200):
        match chance.randint(0, 3):
            case 0:
                count = chance.randint(0, 5)
                unheld = blocks.num_unheld
                taken = blocks.take(count)
                assert (taken is None) == (count > unheld)
                if taken:
                    assert not any(block in held for held in holders for block in taken)
                    content = {k: b for k, b in content.items() if b not in taken}
                    holders.append(taken)
            case 1 if holders:
                held = chance.choice(holders)
                key = f"key{number}"
                content[key] = chance.choice(held)
                blocks.publish(key, content[key])
            case 2 if holders:
                blocks.release(holders.pop(chance.randrange(len(holders))))
            case 3 if content:
                found = blocks.find(chance.choice(list(content)))
                assert found is not None
                blocks.hold([found])
                holders.append([found])
        held_now = {block for held in holders for block in held}
        assert blocks.num_unheld == 12 - len(held_now)
        assert all(blocks.is_held(block) == (block in held_now) for block in range(12))
        assert {key: blocks.find(key) for key in content} == content


def test_what_keeps_nothing_goes_first_then_the_longest_unheld() -> None:
    blocks = HostBlocks(4)
    first, second = blocks.take(2), blocks.take(2)
    assert first is not None and second is not None
    for name, held in (("first", first), ("second", second)):
        for number, block in enumerate(held):
            blocks.publish((name, number), block)
    # the end of a prompt is of no use without its beginning, so it goes first
    blocks.release(first)
    blocks.release(second)
    assert blocks.take(1) == [first[1]]
    assert blocks.find(("first", 0)) is not None and blocks.find(("first", 1)) is None
    assert blocks.take(2) == [first[0], second[1]]


def test_a_key_names_one_block() -> None:
    blocks = HostBlocks(2)
    taken = blocks.take(2)
    assert taken is not None
    for block in taken:
        blocks.publish("same", block)
    assert blocks.find("same") == taken[0]


def test_what_is_nobodys_can_be_neither_published_nor_released() -> None:
    blocks = HostBlocks(1)
    with pytest.raises(ValueError, match="nobody's"):
        blocks.publish("key", 0)
    with pytest.raises(ValueError, match="nobody's"):
        blocks.release([0])


def test_nothing_is_found_once_all_is_forgotten() -> None:
    blocks = HostBlocks(2)
    (block,) = blocks.take(1) or ()
    blocks.publish("key", block)
    blocks.forget_all()
    assert blocks.find("key") is None and blocks.is_held(block)
    blocks.release([block])
    assert blocks.num_unheld == 2


def test_it_tells_what_is_held_and_what_may_be_found() -> None:
    blocks = HostBlocks(10)
    held = blocks.take(3)
    assert held is not None
    blocks.publish("a", held[0])
    blocks.publish("b", held[0])
    assert blocks.use == {"all": 10, "held": 3, "findable": 1}
    blocks.release(held)
    assert blocks.use == {"all": 10, "held": 0, "findable": 1}
    blocks.take(10)
    assert blocks.use == {"all": 10, "held": 10, "findable": 0}
