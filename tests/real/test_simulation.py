"""The simulation: the model reads what it is told, policies are measured as the engine does it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.real.chosen import contrast, keep, observe, record, score
from benchmarks.real.recalled import Reader, Recall, code
from benchmarks.real.simulation import everything, quota_of
from benchmarks.real.tasks import make_examples
from benchmarks.real.told import Memory, ToldModel
from tests.ops.factories import make_cache
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.policy import PolicyOptions, make_policy

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.real.chosen import Probe, Recorded

PAGE_TOKENS = 16
QUERIES = 32
OPTIONS = PolicyOptions()


@pytest.fixture(scope="module")
def model(smollm2: Path) -> ToldModel:
    return ToldModel(str(smollm2))


@pytest.fixture(scope="module")
def recorded(model: ToldModel, tokenizer: Any) -> Recorded:
    (example,) = make_examples("single", 512, 1, tokenizer)
    texts = (example.prompt(tokenizer), example.told)
    prompt, told = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return record(model, "single", prompt, told, QUERIES)


def logits_of(model: ToldModel, recorded: Recorded, reader: Reader) -> torch.Tensor:
    past = recorded.past.first(len(recorded.prompt) - 1)
    return model.answer(past, [recorded.prompt[-1], *recorded.told[:-1]], reader)


def test_a_model_that_may_read_all_is_that_of_transformers(
    model: ToldModel, recorded: Recorded, smollm2: Path
) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        wanted = stock(torch.tensor([recorded.prompt + recorded.told])).logits[0]
    wanted = wanted[len(recorded.prompt) - 1 : -1]
    found = logits_of(model, recorded, Reader(everything(recorded), recorded.past))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


def test_a_token_that_may_not_be_read_has_no_effect(model: ToldModel, recorded: Recorded) -> None:
    kept = everything(recorded)
    kept[:, :, 100:200] = False
    before = logits_of(model, recorded, Reader(kept, recorded.past))
    other = torch.zeros(recorded.memory.num_tokens, 1)
    other[100:200] = 1.0
    keys, values = (
        [one + other for one in side] for side in (recorded.memory.keys, recorded.memory.values)
    )
    changed = replace(recorded, memory=replace(recorded.memory, keys=keys, values=values))
    after = logits_of(model, changed, Reader(kept, recorded.past))
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("policy", ["hybrid", "keydiff", "snapkv", "window"])
def test_a_policy_keeps_its_budget(recorded: Recorded, policy: str) -> None:
    quota = quota_of(recorded, 0.4)
    chooser = make_policy(policy, OPTIONS, PAGE_TOKENS)
    kept = keep(recorded, chooser, OPTIONS, quota, quota.budget_tokens)
    heads = kept.shape[1]
    assert (kept.sum(dim=(1, 2)) <= heads * quota.budget_tokens).all()
    assert kept[:, :, : OPTIONS.sink_tokens].all() and kept[:, :, -1].all()


@pytest.mark.parametrize("takes_largest", [False, True])
def test_measures_are_those_of_the_ops(takes_largest: bool) -> None:
    layout = PageLayout(8, 32, torch.float32)
    heads = make_cache([[40, 33]], layout).heads_of(0)
    probe = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(1))
    count = OPTIONS.top_k_tokens(40)
    found = ops.score(probe, heads, 32**-0.5, count, OPTIONS.sink_tokens, takes_largest, 40)
    pages = heads.table[:, :5].long()
    keys = heads.pool.keys[pages].flatten(1, 2).float()
    held = torch.arange(40) < heads.lens[:, None]
    keys = keys.masked_fill(~held[..., None], 0.0)
    mass, topk_mass = score(probe, keys, found.positions, takes_largest, OPTIONS)
    torch.testing.assert_close(mass, found.mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(topk_mass, found.topk_mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(contrast(keys, held), ops.contrast(heads, 40), atol=1e-5, rtol=1e-4)


def test_an_observation_holds_the_kept_tokens(recorded: Recorded) -> None:
    kept = everything(recorded)[0]
    kept[0, 10:20] = False
    policy = make_policy("hybrid", OPTIONS, PAGE_TOKENS)
    probe = recorded.probe(len(recorded.prompt), "ahead")[0]
    seen = observe(recorded, 0, kept, len(recorded.prompt), probe, policy, OPTIONS)
    assert seen.lens.tolist() == kept.sum(dim=-1).tolist()
    assert seen.positions[0, 10] == 20 and seen.positions[0, -1] == -1
    assert seen.mass is not None and seen.mass[0, -1] == 0


def test_recall_of_as_many_tokens_as_there_are_reads_all(
    model: ToldModel, recorded: Recorded
) -> None:
    kept = torch.zeros_like(everything(recorded))
    all_heads = torch.ones(kept.shape[:2], dtype=torch.bool)
    reader = Reader(kept, recorded.past, Recall(), kept.shape[-1], all_heads)
    found = logits_of(model, recorded, reader)
    wanted = logits_of(model, recorded, Reader(everything(recorded), recorded.past))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_recall_finds_the_best_of_what_was_dropped() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, queries = (torch.randn(2, n, 16, generator=generator) for n in (50, 3))
    kept = torch.zeros(1, 2, 50, dtype=torch.bool)
    kept[..., :10] = True
    reader = Reader(kept, Memory([keys], [keys], keys[None]), Recall(), 4, kept[..., 0] | True)
    found = reader(0, queries, keys)
    assert found[..., :10].all()
    best = (queries @ keys[:, 10:].transpose(1, 2)).topk(4, dim=-1).indices + 10
    assert found[..., 10:].sum(dim=-1).eq(4).all() and found.gather(-1, best).all()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.37), (2, 0.13)])
def test_codes_err_as_their_levels_do(bits: int, error: float) -> None:
    """Lloyd and Max: a Gaussian in 1 or 2 bits has 36 or 12 % of its variance as error."""
    keys = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(3)) * 3 + 5
    found = (code(keys, bits) - keys).square().mean() / keys.var()
    assert 0.9 * error < found < 1.1 * error


@pytest.mark.parametrize("heads_share", [0.1, 1 / 3, 1.0])
def test_a_budget_is_shared_out(heads_share: float) -> None:
    back, own, others = Recall(back=0.5, own=0.25, heads_share=heads_share).split(120)
    total = heads_share * (back + own) + (1 - heads_share) * others
    assert 0.97 * 120 * (0.75 if heads_share == 1 else 1) <= total <= 120
    concentration = torch.rand(30, 3, generator=torch.Generator().manual_seed(4))
    heads = Recall(heads_share=heads_share).heads(concentration)
    assert int(heads.sum()) == round(90 * heads_share)
    assert concentration[heads].min() >= concentration[~heads].max() if heads_share < 1 else True


@pytest.mark.parametrize("source", ["ahead", "replay", "true"])
def test_a_probe_stands_behind_what_was_seen(recorded: Recorded, source: Probe) -> None:
    """At the end all are the question's queries; turned there and back, "true" ones are equal."""
    end = len(recorded.prompt)
    last = recorded.probe(end, source)
    torch.testing.assert_close(last, recorded.probe(end, "true"), atol=0, rtol=0)
    earlier = recorded.probe(end // 2, source)
    assert earlier.shape == last.shape and not torch.equal(earlier, last)
    lengths = earlier.norm(dim=-1)
    if source == "true":
        torch.testing.assert_close(lengths, last.norm(dim=-1), atol=1e-3, rtol=1e-4)


def test_a_replay_behind_all_of_the_prompt_asks_the_question(recorded: Recorded) -> None:
    """The first layer's queries know no context: a look-ahead asks there what a replay asks."""
    seen_tokens = len(recorded.prompt) // 2
    ahead, replay = (recorded.probe(seen_tokens, source)[0] for source in ("ahead", "replay"))
    torch.testing.assert_close(ahead, replay, atol=2e-3, rtol=1e-3)
