"""Where a policy's probe comes from, and what else it is told: read from the real cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.cache.client import LOOKAHEAD, Client, Feature
from tests.cache.scripted import BLOCKS, Scripted, options, small_quota, video_client
from vllm_budgetkv import ops
from vllm_budgetkv.cache.probe.rotation import rotate

if TYPE_CHECKING:
    from vllm_budgetkv.policy import Observation

PROMPT_TOKENS = 480


def make_lab(policy: str, **changes: Any) -> Scripted:
    return Scripted(policy, small_quota(), pool_blocks=BLOCKS, options=options(**changes))


def watch_probes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every probe that is scored, in order: [M, Hq, D], layer by layer."""
    seen: list[torch.Tensor] = []
    score = ops.score

    def spy(probe: torch.Tensor, *args: Any) -> Any:
        seen.append(probe)
        return score(probe, *args)

    monkeypatch.setattr(ops, "score", spy)
    return seen


def watch_observations(monkeypatch: pytest.MonkeyPatch, lab: Scripted) -> list[Observation]:
    seen: list[Observation] = []
    policy = lab.policy
    retain = policy.retain

    def spy(observation: Observation) -> Any:
        # `lens` is a view of the tables, which the compaction changes
        seen.append(replace(observation, lens=observation.lens.clone()))
        return retain(observation)

    monkeypatch.setattr(policy, "retain", spy)
    return seen


def run_ahead(lab: Scripted, client: Client, tokens: int) -> Client:
    ahead = Client(client.request_id + LOOKAHEAD, tokens)
    lab.step({ahead: tokens})
    lab.give_blocks(ahead)
    lab.step({}, finished=(ahead.request_id,))
    return ahead


def test_recent_queries_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each chunk the probe is the chunk's last queries, vision too, at their own places."""
    lab, client = make_lab("snapkv"), video_client()
    probes = watch_probes(monkeypatch)
    lab.run(client, outputs=1)
    assert len(probes) == lab.layers * (20 - 3)
    for index, probe in enumerate(probes):
        chunk, layer = divmod(index, lab.layers)
        stop = 24 * (chunk + 4)
        assert torch.equal(probe, lab.project(client, layer, stop - 4, 4)[0])


def test_recent_queries_of_decode_push_the_oldest_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, client = make_lab("snapkv"), video_client()
    lab.run(client, outputs=1)
    probes = watch_probes(monkeypatch)
    lab.run(client, outputs=11)
    assert len(probes) == lab.layers, "one compaction before the ninth token"
    assert torch.equal(probes[2], lab.project(client, 2, PROMPT_TOKENS + 8 - 4, 4)[0])


def test_the_template_stays_the_probe() -> None:
    """What ran ahead is all that ever asks, whatever text comes behind the video."""
    lab, client = make_lab("streammem", template_tokens=3), video_client()
    run_ahead(lab, client, 3)
    lab.run(client, outputs=12)
    bank = lab.cache.slots.requests[client.request_id].bank
    assert bank is not None and (bank.capacity, bank.num_written) == (3, 3)
    assert bank.positions.tolist() == [0, 1, 2]
    for layer in range(lab.layers):
        assert torch.equal(bank.queries[layer], lab.project(client, layer, 0, 3)[0])


def test_the_template_is_turned_to_the_end_of_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, client = make_lab("streammem", template_tokens=3), video_client()
    run_ahead(lab, client, 3)
    probes = watch_probes(monkeypatch)
    lab.run(client, outputs=1)
    raw = lab.script[0][0, :3]
    rotary = lab.rotary
    for chunk, probe in enumerate(probes[:: lab.layers]):
        stop = 24 * (chunk + 4)
        place = torch.arange(stop, stop + 3)
        expected = rotate(raw, place, rotary.inv_freq, rotary.is_neox)
        torch.testing.assert_close(probe, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("video_tokens", [0, 100], ids=["text alone", "long text behind a video"])
def test_a_long_text_does_not_displace_the_question(
    monkeypatch: pytest.MonkeyPatch, video_tokens: int
) -> None:
    """Each chunk's own last words took the place of the question that ran ahead."""
    probe_tokens = 8
    lab = make_lab("hybrid", probe_tokens=probe_tokens)
    features = [Feature(6, video_tokens, 4)] if video_tokens else []
    client = Client("text", PROMPT_TOKENS, features)
    run_ahead(lab, client, probe_tokens)
    probes = watch_probes(monkeypatch)
    lab.run(client, outputs=1)
    of_first_layer = probes[:: lab.layers]
    raw, rotary = lab.script[0][0, :probe_tokens], lab.rotary
    # all chunks but the last, in which the question itself stands
    for chunk, probe in enumerate(of_first_layer[:-1]):
        stop = PROMPT_TOKENS - 24 * (len(of_first_layer) - 1 - chunk)
        place = torch.arange(stop, stop + probe_tokens)
        expected = rotate(raw, place, rotary.inv_freq, rotary.is_neox)
        torch.testing.assert_close(probe, expected, rtol=0, atol=1e-4)
    assert len(of_first_layer) > 10


def test_a_short_prompt_probes_with_its_own_template() -> None:
    """Nothing runs ahead of it, but its long output is compacted with its template's queries."""
    lab, client = make_lab("streammem", template_tokens=3), Client("short", 20)
    lab.run(client, outputs=100)
    request = lab.cache.slots.requests[client.request_id]
    assert request.shared and request.bank is not None
    assert request.bank.positions.tolist() == [17, 18, 19]
    assert request.bank.num_written == 3


@pytest.mark.parametrize("takes_largest", [False, True], ids=["mean", "largest"])
def test_a_policy_is_told_the_mass_it_takes(
    monkeypatch: pytest.MonkeyPatch, takes_largest: bool
) -> None:
    """The means sum to 1, the largest of several rows to more."""
    lab, client = make_lab("snapkv"), video_client()
    monkeypatch.setattr(lab.policy, "takes_largest", takes_largest)
    seen = watch_observations(monkeypatch, lab)
    lab.run(client, outputs=12)
    assert seen
    for observation in seen:
        assert observation.mass is not None
        sums = observation.mass.sum(dim=1)
        assert bool((sums > 1.01).all()) if takes_largest else sums.allclose(torch.ones(1))


@pytest.mark.parametrize("policy", ["random", "window", "keydiff", "infinipot-v", "cords"])
def test_a_policy_without_scores_pays_for_no_probe(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    lab, client = make_lab(policy), video_client()
    probes = watch_probes(monkeypatch)
    lab.run(client, outputs=12)
    assert not probes
    assert lab.cache.slots.requests[client.request_id].bank is None


@pytest.mark.parametrize("policy", ["snapkv", "ada-snapkv", "streammem", "keydiff"])
def test_no_digest_and_no_retrieval_without_dynamic_heads(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    lab, client = make_lab(policy), video_client()
    digests: list[Any] = []
    monkeypatch.setattr(ops, "digest", lambda *args: digests.append(args))
    lab.run(client, outputs=12)
    assert not digests
    assert all(step.num_retrieving_rows == 0 for step in lab.steps)


@pytest.mark.parametrize("policy", ["keydiff", "hybrid", "infinipot-v", "cords"])
def test_keys_and_norms_are_those_of_the_held_tokens(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    lab, client = make_lab(policy), video_client()
    observations = watch_observations(monkeypatch, lab)
    lab.run(client, outputs=1)
    spans = lab.cache.slots.requests[client.request_id].spans
    assert len(observations) == lab.layers * (20 - 3)
    for seen in observations[::5]:
        shadow = lab.shadow[client.request_id, seen.layer]
        for head, count in enumerate(seen.lens.tolist()):
            positions = seen.positions[head, :count].long()
            held = shadow[positions, :, head]
            if policy == "cords":
                for vectors, part in ((seen.keys, 0), (seen.values, 1)):
                    assert vectors is not None and seen.contrast is None
                    assert torch.equal(vectors[head, :count], held[:, part])
                    assert (vectors[head, count:] == 0).all()
                continue
            if policy != "infinipot-v":
                assert seen.contrast is not None
                unit = normalize(held[:, 0].double(), dim=1)
                expected = 1 - unit @ normalize(unit.sum(dim=0), dim=0)
                found = seen.contrast[head].double()
                torch.testing.assert_close(found[:count], expected, atol=1e-6, rtol=0)
                assert (found[count:] == 0).all()
                assert seen.keys is None and seen.values is None and seen.frame_ids is None
                continue
            assert seen.keys is not None and seen.contrast is None
            assert torch.equal(seen.keys[head, :count], held[:, 0])
            assert (seen.keys[head, count:] == 0).all()
            assert seen.value_norms is not None and seen.frame_ids is not None
            torch.testing.assert_close(seen.value_norms[head, :count], held[:, 1].norm(dim=-1))
            frames = torch.div(positions - 6, 4, rounding_mode="floor").int()
            is_vision = (positions >= 6) & (positions < spans.end_of_vision)
            expected = torch.where(is_vision, frames, -1)
            assert torch.equal(seen.frame_ids[head, :count], expected)


@pytest.mark.parametrize(
    ("policy", "changes", "contrasted"),
    [
        ("snapkv", {}, set()),
        ("keydiff", {}, {False}),
        ("hybrid", {}, {True}),
        ("hybrid", {"unlike_share": 0.0}, set()),
    ],
    ids=str,
)
def test_policies_get_what_they_need(
    monkeypatch: pytest.MonkeyPatch, policy: str, changes: dict[str, Any], contrasted: set[bool]
) -> None:
    """The first chunks come before any text. `contrasted`: whether what has contrast has scores.

    Bug: `hybrid` had `contrast` computed also without a probe, and with an `unlike_share` of 0,
    although it reads it in neither case.
    """
    lab = make_lab(policy, **changes)
    observations = watch_observations(monkeypatch, lab)
    lab.run(Client("video", PROMPT_TOKENS, [Feature(0, 400, 4)]), outputs=1)
    scored = {seen.mass is not None for seen in observations}
    assert scored == {"snapkv": {True}, "keydiff": {False}, "hybrid": {True, False}}[policy]
    for seen in observations:
        assert (seen.contrast is not None) == ((seen.mass is not None) in contrasted)
        assert seen.keys is None and seen.frame_ids is None


@pytest.mark.parametrize("policy", ["pyramidkv", "sparsemm"])
def test_layers_hold_what_the_policy_wants(policy: str) -> None:
    """At the end of a long prefill, and again after compactions of decode."""
    lab, client = make_lab(policy), video_client()
    lab.run(client, outputs=1)
    sizes = (lab.layers, lab.heads, lab.quota.budget_tokens)
    desired = lab.policy.layer_budgets(*sizes)
    assert desired is not None and len(set(desired)) == lab.layers
    for outputs in (1, 26):
        lab.run(client, outputs=outputs)
        grown = lab.cache.slots.requests[client.request_id].grown_tokens
        lens = lab.cache.tables.lens[lab.slot(client)].float().mean(dim=1) - grown
        # sharing between the heads rounds down
        assert all(0 <= want - mean < 2 for want, mean in zip(desired, lens.tolist(), strict=True))


def test_a_resumed_request_starts_with_equal_layers() -> None:
    lab, client = make_lab("pyramidkv"), video_client()
    lab.run(client, outputs=2)
    budgets = lab.cache.slots.requests[client.request_id].layer_budgets
    assert budgets is not None and budgets.caps[0] > budgets.budget_tokens
    lab.give_blocks(client)
    lab.step({}, preempted=(client.request_id,))
    lab.step({client: 24})
    assert lab.cache.slots.requests[client.request_id].layer_budgets is None
    lab.run(client, outputs=4)
    again = lab.cache.slots.requests[client.request_id].layer_budgets
    assert again is not None and again is not budgets and again.caps == budgets.caps
