"""What the model is trained on is what the engine will show it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.quality import conversations, curriculum, reader, recitals, train
from benchmarks.quality.batches import IGNORE, Collator
from benchmarks.quality.conversations import VIDEO, VISION_START, Conversation, Grid, draw_frames
from benchmarks.quality.scenes import Palette
from vllm_budgetkv.testing.models import build_processor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def vocabulary():
    return reader.build_vocabulary()


@pytest.fixture(scope="module")
def untrained(vocabulary):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(reader.build_config(vocabulary)).float().eval()


def two_videos(rng: np.random.Generator) -> Conversation:
    scenes = [draw_frames(["K7", "", "A2"], Grid(2, 4), rng), draw_frames(["B1"], Grid(2, 4), rng)]
    return Conversation(f"one{VIDEO}two{VIDEO}", scenes, [("K?", "7"), ("read", "K7A2B1")])


def test_positions_are_those_of_the_model(vocabulary, untrained) -> None:
    batch = Collator(vocabulary)([two_videos(np.random.default_rng(0))])
    expected, _ = untrained.model.get_rope_index(
        batch.input_ids,
        mm_token_type_ids=2 * batch.is_vision.int(),
        video_grid_thw=torch.tensor([[3, 4, 8], [1, 4, 8]]),
        second_per_grid_ts=torch.ones(2),
    )
    assert torch.equal(batch.position_ids, expected)


def test_labels_are_the_answers_and_their_ends(vocabulary) -> None:
    talk = two_videos(np.random.default_rng(0))
    batch = Collator(vocabulary)([talk])
    learnt = batch.labels[batch.labels != IGNORE]
    assert vocabulary.decode(learnt) == "7<|im_end|>K7A2B1<|im_end|>"
    places = torch.nonzero(batch.labels[0] != IGNORE)[:, 0]
    assert torch.equal(batch.input_ids[0, places + 1], learnt)
    assert batch.turns[0, places].tolist() == [0] * 2 + [1] * 7


@pytest.mark.parametrize("num_frames", [0, 3])
def test_recited_digits_are_learnt_where_they_stand(vocabulary, num_frames: int) -> None:
    rng = np.random.default_rng(0)
    talk = recitals.recital_conversation(num_frames, 4, 2, Grid(1, 1), rng)
    batch = Collator(vocabulary)([talk])
    within = (batch.labels != IGNORE) & (batch.turns == -1)
    text, places = talk.content.removeprefix(VIDEO), torch.nonzero(within)[:, 1]
    pairs = re.findall("[A-Z][0-9]", text)
    shown = read_off(talk.scenes[0])
    assert any(pair in shown for pair in pairs) == bool(num_frames)
    assert any(pair not in shown for pair in pairs)
    repeated = [pair for i, pair in enumerate(pairs) if pair in shown or pair in pairs[:i]]
    assert vocabulary.decode(batch.input_ids[0, places]) == "".join(pair[0] for pair in repeated)
    assert vocabulary.decode(batch.labels[within]) == "".join(pair[1] for pair in repeated)
    asked = batch.labels[(batch.labels != IGNORE) & (batch.turns >= 0)]
    assert vocabulary.decode(asked) == "".join(f"{a}<|im_end|>" for _, a in talk.turns)


def test_practised_answers_are_learnt_where_they_stand(vocabulary) -> None:
    """The content holds question and answer, none twice; the last turns stay with the chat."""
    rng = np.random.default_rng(0)
    talk = conversations.pages_conversation(6, 2, 40, Grid(1, 1), rng)
    talk.ask_once()
    asked = list(talk.turns)
    assert len(asked) == len({question for question, _ in asked}) == 6
    talk.practise(2)
    assert talk.turns == asked[4:]
    assert talk.content.endswith("".join(f"{q}{a};" for q, a in asked[:4]))
    batch = Collator(vocabulary)([talk])
    learnt = batch.labels != IGNORE
    within = learnt & (batch.turns == -1)
    assert vocabulary.decode(batch.labels[within]) == "".join(a for _, a in asked[:4])
    before = torch.nonzero(within)[:, 1]
    assert torch.equal(batch.input_ids[0, before + 1], batch.labels[within])
    chat = vocabulary.decode(batch.labels[learnt & (batch.turns >= 0)])
    assert chat == "".join(f"{a}<|im_end|>" for _, a in asked[4:])


@pytest.mark.parametrize("written", [0.0, 0.5, 1.0])
def test_the_pairs_of_a_list_are_those_of_the_pages(vocabulary, written: float) -> None:
    """Of all but the one that is asked for; a pair is drawn or written, the first always drawn."""
    rng = np.random.default_rng(0)
    talk = conversations.listed_conversation(6, 2, Grid(1, 1), rng, written=written)
    pages, _, entries = talk.content.partition(";")
    drawn = iter("".join(read_off(scene)) for scene in talk.scenes)
    shown = {
        number: pair or next(drawn)
        for number, pair in re.findall(f"page([0-9]):{re.escape(VISION_START)}([A-Z][0-9])?", pages)
    }
    assert len(talk.scenes) == {0.0: 6, 1.0: 1}.get(written, len(talk.scenes))
    assert 1 <= len(talk.scenes) <= 6
    ((question, answer),) = talk.turns
    listed = dict(re.findall("([0-9])([A-Z][0-9])", entries))
    assert listed | {question[4]: answer} == shown
    assert (len(shown), len(listed)) == (6, 5)
    batch = Collator(vocabulary)([talk])
    within = (batch.labels != IGNORE) & (batch.turns == -1)
    assert vocabulary.decode(batch.labels[within]) == "".join(listed.values())


def test_the_letter_of_a_number_that_comes_again_is_learnt(vocabulary) -> None:
    talk = recitals.index_conversation(4, 12, Grid(1, 1), np.random.default_rng(0))
    entries = re.findall("([0-9])([A-Z])", talk.content)
    assert len(entries) == 12
    assert len(set(entries)) == len(dict(entries)) <= 4
    again = [
        letter for i, (number, letter) in enumerate(entries) if (number, letter) in entries[:i]
    ]
    batch = Collator(vocabulary)([talk])
    within = (batch.labels != IGNORE) & (batch.turns == -1)
    assert vocabulary.decode(batch.labels[within]) == "".join(again)


def test_patches_of_a_scene_are_those_of_its_pixels(vocabulary) -> None:
    processor, palette = build_processor(vocabulary), Palette()
    scene = draw_frames(["K7", "", "A2"], Grid(2, 4), np.random.default_rng(1))
    output = processor.video_processor(
        videos=[palette.draw(scene)], do_sample_frames=False, return_tensors="pt"
    )
    found = palette.patches(processor)[scene.ravel()].flatten(0, 1)
    assert output["video_grid_thw"].tolist() == [[3, 4, 8]]
    assert torch.equal(found, output["pixel_values_videos"])


def test_the_batched_tower_is_the_tower(vocabulary) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(reader.build_config(vocabulary)).float().eval()
    pixels, grid = torch.randn(5 * 16, 1176), torch.tensor([[5, 4, 4]])
    with torch.no_grad():
        expected = model.model.visual(pixels, grid_thw=grid).pooler_output
        train.attend_in_batches(model.model.visual)
        found = model.model.visual(pixels, grid_thw=grid).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("step", range(0, curriculum.LAST_STEP, 397))
def test_every_stage_draws(step: int) -> None:
    talks = curriculum.sample(step, 512, curriculum.rng_of(0, step))
    assert len(talks) >= 2
    for talk in talks:
        text = talk.content + "".join(question for question, _ in talk.turns)
        assert text.count(VIDEO) == len(talk.scenes)
        # a video of background alone is read as nothing
        shown = any("".join(read_off(scene)) for scene in talk.scenes)
        assert all(answer or (question == "read" and not shown) for question, answer in talk.turns)


def test_answers_can_be_read_off_the_scene() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        talk = conversations.video_conversation(
            12, 6, Grid(2, 2), rng, kinds=curriculum.ASKED["video"], blank=0.3
        )
        shown = read_off(talk.scenes[0])
        for question, answer in talk.turns:
            assert answer == answer_of(question, shown)


def read_off(scene: np.ndarray) -> list[str]:
    """The pair of every frame, from the ids of its cells."""
    from benchmarks.quality import scenes

    pairs = []
    for frame in scene.reshape(len(scene), -1):
        signs = frame[frame < scenes.landscape_id(0)] % scenes.NUM_SIGNS
        pairs.append(f"{scenes.LETTERS[signs[0] // 10]}{signs[0] % 10}" if len(signs) else "")
    return pairs


def answer_of(question: str, shown: list[str]) -> str:
    """What a careful reader answers."""
    digits = [pair[1] for pair in shown if pair[:1] == question[0]]
    letters = [pair[:1] for pair in shown]
    kind = curriculum.kind_of(question)
    if kind == "order":
        return min(question[0], question[1], key=letters.index)
    if kind == "next":
        return shown[letters.index(question[0]) + 1]
    answers = {
        "needle": digits[0],
        "first": digits[0],
        "last": digits[-1],
        "change": digits[0] + digits[-1],
        "count": str(len(digits)),
    }
    return answers[kind]


def test_no_token_is_drowned_at_the_start(vocabulary) -> None:
    """Otherwise the model does not learn to look up what a text has shown."""
    torch.manual_seed(0)
    language = reader.build_untrained(vocabulary).model.language_model
    ids = torch.randint(0, 64, (4, 40))
    embeds = language.embed_tokens(ids)
    added = language.layers[0](
        embeds,
        position_embeddings=language.rotary_emb(embeds, torch.arange(40).expand(3, 4, -1)),
        attention_mask=None,
    )
    assert (added - embeds).std() < embeds.std()


def test_heads_look_back_at_the_start(vocabulary) -> None:
    """The weight that each head of `LOOK_BACK_TOKENS` gives to the token so far before."""
    torch.manual_seed(0)
    language = reader.build_untrained(vocabulary).model.language_model
    layer = language.layers[0]
    layer.self_attn.config._attn_implementation = "eager"  # the one that gives the weights
    ids = torch.randint(0, 300, (1, 60))
    embeds = layer.input_layernorm(language.embed_tokens(ids))
    with torch.no_grad():
        _, weights = layer.self_attn(
            embeds,
            position_embeddings=language.rotary_emb(embeds, torch.arange(60).expand(3, 1, -1)),
            attention_mask=torch.full((60, 60), -1e9).triu(1)[None, None],
        )
    for head, distance_tokens in reader.LOOK_BACK_TOKENS.items():
        looked = weights[0, head].diagonal(-distance_tokens)[4:]
        assert looked.median() > 0.7


def test_a_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    def run(work: Path, stops: list[int]) -> dict[str, torch.Tensor]:
        for stop in stops:
            trainer = train.Trainer(work, 1e-3, seed=3)
            while trainer.step < stop:
                trainer.train_step(1e-3, 256)
            trainer.save()
        return trainer.model.state_dict()

    folders = [tmp_path / "whole", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
    whole, resumed = run(folders[0], [3]), run(folders[1], [2, 3])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
