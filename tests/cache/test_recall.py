"""Recall under random chunks, aborts and preemptions: quota, content and attention, no model."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

from tests.cache.client import Client
from tests.cache.lab import Lab
from tests.cache.test_scenarios import assert_empty, play
from vllm_budgetkv.arithmetic.host_blocks import HostBlocks
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.policy import PolicyOptions
from vllm_budgetkv.scheduler.prompts import (
    Found,
    HostPrompts,
    ItemEnd,
    PromptKeys,
    most_reused_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.cache.recaller import Recaller
    from vllm_budgetkv.cache.step import Step

SCENARIOS = 100
MAX_TOKENS = 400


class RecallLab(Lab):
    """Every decode step's attention is dense attention over what is kept and what came back.

    Tokens are made of their content: clients of one family begin with the same ones.

    Args:
        tier_blocks: of host memory.
    """

    max_tokens = MAX_TOKENS

    def __init__(self, *args: Any, tier_blocks: int, **kwargs: Any) -> None:
        self.tier_blocks = tier_blocks
        self.num_checked = 0
        self.families: dict[str, tuple[str, int]] = {}
        self.found: dict[str, Found] = {}
        self.found_first: dict[str, int] = {}
        self.stops_of: dict[str, list[int]] = {}
        self.contents: dict[tuple[str, int], torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        self.prompts = HostPrompts(HostBlocks(tier_blocks), self.quota.page_tokens, lambda _: False)

    def host_memory(self) -> dict[str, int]:
        return {"max_model_tokens": self.max_tokens, "host_blocks": self.tier_blocks}

    def summarizes(self) -> bool:
        return True

    # --- contents -------------------------------------------------------------------------------

    def content(self, name: str, layer: int) -> torch.Tensor:
        """[max_tokens, G * H + 2 * H, D]: query, key and value of the tokens of a content."""
        if (name, layer) not in self.contents:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{layer}".encode()))
            shape = (self.max_tokens, (self.group + 2) * self.heads, self.head_size)
            self.contents[name, layer] = torch.randn(shape, generator=generator)
        return self.contents[name, layer]

    def tokens_of(self, client: Client, layer: int) -> torch.Tensor:
        """The same of a client: those of its family, then its own."""
        family, shared_tokens = self.families.get(client.request_id, ("", 0))
        own = self.content(client.request_id, layer)
        return torch.cat((self.content(family, layer)[:shared_tokens], own[shared_tokens:]))

    def project(self, client: Client, layer: int, first: int, count: int) -> Any:
        made = self.tokens_of(client, layer)[first : first + count]
        return made.split((self.group * self.heads, self.heads, self.heads), dim=1)

    def keys_of(self, client: Client) -> PromptKeys:
        family, shared_tokens = self.families.get(client.request_id, ("", 0))
        page_tokens = self.quota.page_tokens

        def key(stop: int) -> tuple[str, int]:
            return (family if stop <= shared_tokens else client.request_id), stop

        stops = range(page_tokens, client.prompt_tokens + 1, page_tokens)
        items = (feature.offset + feature.length for feature in client.features)
        ends = [ItemEnd(stop, ("end", *key(stop))) for stop in items if stop % page_tokens]
        return PromptKeys([key(stop) for stop in stops], ends)

    def arrive(self, client: Client) -> None:
        self.prompts.leave(client.request_id)
        ends = (feature.offset + feature.length for feature in client.features)
        most_tokens = most_reused_tokens(
            self.quota,
            client.prompt_tokens,
            probe_tokens=self.options.probe_tokens,
            end_of_items=max(ends, default=0),
        )
        found = self.prompts.find(client.request_id, self.keys_of(client), most_tokens)
        if found is None or not self.prompts.has_room(client.prompt_tokens, found):
            found = Found()
        if self.quota.fits(client.prompt_tokens):
            found = Found()
        self.found[client.request_id] = found
        stops = list(self.random_stops(found.num_tokens))
        self.stops_of[client.request_id] = stops
        client.computed_tokens = found.num_tokens
        client.lead_tokens = found.num_tokens - (stops[-1] if stops else 0)

    def random_stops(self, num_tokens: int) -> Iterator[int]:
        """Chunks as a prefill could have made them; what is left begins a chunk."""
        stop = 0
        while (stop := stop + self.random.randint(1, self.quota.chunk_tokens)) <= num_tokens:
            yield stop

    def host_place(self, client: Client) -> HostPlace | None:
        if self.quota.fits(client.prompt_tokens):
            return None
        found = self.found[client.request_id]
        sizes = (client.request_id, client.prompt_tokens, self.keys_of(client), found)
        place = self.prompts.admit(*sizes, list(self.stops_of[client.request_id]))
        assert place is not None or not found.num_tokens
        first = self.found_first.setdefault(client.request_id, found.num_tokens)
        place = place and replace(place, found_tokens=first)
        for layer in range(self.layers):
            made = self.tokens_of(client, layer)[: found.num_tokens]
            kept = made[:, self.group * self.heads :].unflatten(1, (2, self.heads))
            self.shadow[client.request_id, layer] = torch.stack(self.kept(*kept.unbind(1)), dim=1)
        return place

    def step(self, work: dict[Client, int], **gone: Any) -> Step | None:
        for request_id in (*gone.get("finished", ()), *gone.get("preempted", ())):
            self.prompts.leave(request_id)
        seen = {client: client.computed_tokens + count for client, count in work.items()}
        step = super().step(work, **gone)
        for client, seen_tokens in seen.items():
            self.prompts.wrote(client.request_id, seen_tokens)
        return step

    @property
    def recaller(self) -> Recaller:
        recaller = self.cache.layers.recaller
        assert recaller is not None
        return recaller

    def num_recalled(self, client: Client, layer: int, head: int) -> int:
        state = self.state(client)
        return int(self.recaller.num_recalled[state.slot, layer, head]) if state.recalls else 0

    def run_layer(self, step: Step, layer: int, *tensors: torch.Tensor) -> None:
        super().run_layer(step, layer, *tensors)
        query, _, _, out = tensors
        for row, plan in enumerate(step.plans[: step.num_recalling_rows]):
            if plan.compress:
                continue  # what was read is gone
            client = next(c for c in self.clients if c.request_id == plan.request.request_id)
            if plan.request.recalls:
                self._check_recalled(client, layer)
            if self.reads_all_pages or not plan.request.has_digests:
                self._check_attention(client, layer, query[row], out[row])

    def forward(self, work: dict[Client, int]) -> Step:
        self.clients = list(work)
        return super().forward(work)

    # --- recall ---------------------------------------------------------------------------------

    def _check_recalled(self, client: Client, layer: int) -> None:
        """What came back is of the prompt, and nothing that the head keeps."""
        for head in range(self.heads):
            count = self.num_recalled(client, layer, head)
            positions = self.held(client, layer, head).tolist()
            assert len(set(positions)) == len(positions)
            assert all(0 <= position < client.prompt_tokens for position in positions[:count])

    def _check_attention(
        self, client: Client, layer: int, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        for head in range(self.heads):
            shadow = self.shadow[client.request_id, layer]
            keys, values = shadow[self.held(client, layer, head), :, head].unbind(1)
            group = slice(head * self.group, (head + 1) * self.group)
            logits = query[group] @ keys.T * self.head_size**-0.5
            torch.testing.assert_close(
                out[group], logits.softmax(-1) @ values, rtol=1e-4, atol=1e-4
            )
        self.num_checked += 1


AnyLab = TypeVar("AnyLab", bound=RecallLab)


def make_lab(seed: int, kind: type[AnyLab] = RecallLab) -> AnyLab:
    chance = random.Random(seed)
    page_tokens, num_layers = chance.choice([8, 16]), chance.choice([1, 2, 3])
    heads = chance.choice([1, 2, 3])
    numbers: dict[str, Any] = {
        "page_tokens": page_tokens,
        "num_layers": num_layers,
        "chunk_tokens": chance.randint(10, 50),
        "decode_interval_tokens": chance.randint(1, 12),
        "retrieves": True,
        "recall": Recall(
            num_heads=chance.randint(1, num_layers * heads),
            all_heads=num_layers * heads,
            page_words=kind.layout_of(page_tokens, 32).page_words,
            code_words=1,
            slots_share=chance.choice([0.2, 0.5, 1.0]),
            max_index_share=chance.choice([0.3, 0.9]),
        ),
    }
    smallest = Quota(blocks=10**6, **numbers).min_blocks
    quota = Quota(blocks=smallest + chance.randint(0, 6), **numbers)
    return kind(
        "hybrid",
        quota,
        pool_blocks=max(40, 5 * quota.blocks),
        heads=heads,
        group=chance.choice([1, 2]),
        seed=seed,
        tier_blocks=chance.choice([1, 30, 200]),
    )


@pytest.mark.parametrize("block", range(4))
def test_random_scenarios(block: int) -> None:
    count, checked = SCENARIOS // 4, 0
    for seed in range(block * count, (block + 1) * count):
        lab = make_lab(seed)
        play(lab, num_steps=45)
        assert_empty(lab)
        assert lab.prompts.blocks.num_unheld == lab.tier_blocks
        assert (lab.recaller.tier.blocks == -1).all()
        for counts in (lab.recaller.num_tokens, lab.recaller.num_recalled, lab.recaller.moved):
            assert not counts.any()
        checked += lab.num_checked
    assert checked > 5 * count


NUMBERS: dict[str, Any] = {
    "blocks": 12,
    "page_tokens": 8,
    "num_layers": 3,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
    "retrieves": True,
}
HEADS = 2
# pages of 8 tokens of 32 channels in float32
PAGE: dict[str, Any] = {"page_words": 512, "code_words": 1}
RECALL = Recall(num_heads=2, all_heads=6, **PAGE, slots_share=0.5, max_index_share=0.5)


def small_lab(
    recall: Recall = RECALL,
    tier_blocks: int = 100,
    kind: type[RecallLab] = RecallLab,
    **kwargs: Any,
) -> RecallLab:
    quota = Quota(**NUMBERS, recall=recall)
    return kind("hybrid", quota, pool_blocks=30, heads=HEADS, tier_blocks=tier_blocks, **kwargs)


def run(lab: RecallLab, client: Client, outputs: int) -> Client:
    while client.output_tokens < outputs:
        lab.step({client: lab.room(client)})
    return client


def recalling_heads(lab: RecallLab, client: Client) -> list[list[int]]:
    return (lab.recaller.num_recalled[lab.state(client).slot] > 0).nonzero().tolist()


def test_the_most_concentrated_heads_recall() -> None:
    lab = small_lab()
    client = run(lab, Client("long", 300), outputs=1)
    found = lab.cache.tables.concentration[lab.state(client).slot].flatten()
    best = sorted(found.topk(RECALL.num_heads).indices.tolist())
    assert [layer * HEADS + head for layer, head in recalling_heads(lab, client)] == best


def test_a_head_that_recalls_reads_all_of_its_pages() -> None:
    """Also a dynamic one, whose digests know nothing of what came back."""
    lab = small_lab(options=PolicyOptions(probe_tokens=4, force_class="dynamic"))
    client = run(lab, Client("long", 300), outputs=20)
    slot = lab.state(client).slot
    recalls = lab.recaller.num_tokens[slot] > 0
    assert torch.equal(lab.cache.tables.is_retrieving[slot], ~recalls)


def test_a_head_that_recalls_all_reads_as_if_nothing_had_been_dropped() -> None:
    """Kept and recalled tokens are the whole prompt, so the output is that of dense attention."""
    greedy = Recall(num_heads=1, all_heads=6, **PAGE, slots_share=1.0, max_index_share=0.9)
    found = 0
    for prompt_tokens in range(97, 113):
        lab = small_lab(greedy, options=PolicyOptions(probe_tokens=4, retrieval_ratio=1.0))
        client = run(lab, Client("long", prompt_tokens), outputs=2)
        ((layer, head),) = recalling_heads(lab, client)
        positions = lab.held(client, layer, head)
        lacking = client.computed_tokens - len(positions)
        # whole pages come back, so less than one may be missing
        assert 0 <= lacking < lab.quota.page_tokens
        found += lacking == 0
        # the lab has compared the output with dense attention over these positions
        assert lab.num_checked > 0
    assert found > 0


def test_what_is_still_wanted_is_not_moved_again() -> None:
    """A query that does not change moves nothing in the next step."""
    lab = small_lab()
    query = lab.randn(1, lab.heads * lab.group)
    projected = lab.project

    def same_query(client: Client, layer: int, first: int, count: int) -> Any:
        _, key, value = projected(client, layer, first, count)
        return query.expand(count, -1, -1), key, value

    lab.project = same_query  # type: ignore[method-assign]
    client = run(lab, Client("long", 300), outputs=1)
    slot = lab.state(client).slot
    moved = lab.recaller.moved[slot].clone()
    assert torch.equal(moved, lab.recaller.num_recalled[slot])
    run(lab, client, outputs=5)
    assert torch.equal(lab.recaller.moved[slot], moved)


def test_lost_and_doubled_recall_pages_are_found() -> None:
    for name in ("index", "slots"):
        lab = small_lab()
        client = run(lab, Client("long", 300), outputs=2)
        slot = lab.state(client).slot
        layer, head = recalling_heads(lab, client)[0]
        if name == "index":
            lab.recaller.index[slot, layer, head, 0] = -1
        else:
            lab.recaller.num_recalled[slot, layer, head] -= lab.quota.page_tokens
        with pytest.raises(RuntimeError, match="lost, foreign or held twice"):
            lab.step({})


def test_no_request_reads_host_memory_of_another() -> None:
    """Two requests of equal positions and unlike content, turn by turn: bits are compared."""
    lab = small_lab()
    clients = [Client(name, 300) for name in ("one", "other")]
    while min(client.output_tokens for client in clients) < 12:
        lab.step({client: lab.room(client) for client in clients})
    blocks = lab.recaller.tier.blocks[[lab.state(client).slot for client in clients]]
    taken = blocks[blocks >= 0]
    assert taken.unique().numel() == taken.numel() == 2 * 38
