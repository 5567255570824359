"""A worker without a model: a random scheduler drives the real cache, a shadow checks all bytes."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from tests.cache.client import Client, parent_of
from tests.policy.factories import head_scores_file
from vllm_budgetkv.arithmetic.layout import BlockLayout, PageLayout, PagePool
from vllm_budgetkv.arithmetic.terms import Terms
from vllm_budgetkv.cache.build import Model, build_cache
from vllm_budgetkv.cache.probe.bank import Rotary
from vllm_budgetkv.cache.rules import Arrival, Offer, Rules
from vllm_budgetkv.ops.reference.quantise import quantise
from vllm_budgetkv.policy import PolicyOptions, make_policy

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.cache import BudgetCache
    from vllm_budgetkv.cache.report import RequestRecord
    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.step import Step
    from vllm_budgetkv.policy import Policy


class Lab:
    """The real cache of a worker with `layers` x `heads` heads, and a shadow of every token.

    Queries, keys and values are random; override `project` to say what they are, and `see` to look
    at what attention makes of them.

    Args:
        policy: name of the policy.
        quota: what one request may hold.
        pool_blocks: blocks of the pool.
        group: query heads per KV head (G).
    """

    rope_base = 100.0
    reads_all_pages = False
    """Whether rows that retrieve read every page, so that their output must be dense attention."""
    units: tuple[float, float] | None = None
    """What a stored key and a stored value of 1 stand for, where they are quantised."""

    def __init__(
        self,
        policy: str,
        quota: Quota,
        *,
        pool_blocks: int,
        heads: int = 2,
        group: int = 2,
        head_size: int = 32,
        num_slots: int = 6,
        options: PolicyOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.quota, self.heads, self.group, self.head_size = quota, heads, group, head_size
        self.layers = quota.num_layers
        self.options = options or PolicyOptions(sink_tokens=2, window_tokens=8, probe_tokens=4)
        if policy == "sparsemm":
            scores_file = str(head_scores_file(self.layers, heads))
            self.options = replace(self.options, head_scores_file=scores_file)
        layout = self.layout_of(quota.page_tokens, head_size)
        # pages that no head has lie between blocks, as where state of other layers is larger
        unused_pages = 3 if quota.block_pages > 1 else 0
        self.blocks = BlockLayout(self.layers, heads, quota.block_pages, unused_pages)
        num_pages = pool_blocks * self.blocks.stride_pages
        raw = torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8)
        self.pool = PagePool(raw, layout)
        self.free_blocks = list(range(pool_blocks))
        self.finished: list[RequestRecord] = []
        self.cache = self.make_cache(policy, num_slots)
        # per (request, layer): [prompt and output tokens, 2 (K, V), H, D]
        self.shadow: dict[tuple[str, int], torch.Tensor] = {}
        self.gone: set[str] = set()

    @classmethod
    def layout_of(cls, page_tokens: int, head_size: int) -> PageLayout:
        return PageLayout(page_tokens, head_size, torch.float32, cls.units is not None)

    def make_cache(self, policy: str, num_slots: int) -> BudgetCache:
        """The cache that a worker would build."""
        model = Model(
            pool=self.pool,
            blocks=self.blocks,
            layer_index={f"layer{i}": i for i in range(self.layers)},
            scales=dict.fromkeys(range(self.layers), self.head_size**-0.5),
            rotaries=self.rotaries(),
            num_query_heads=self.heads * self.group,
            units={} if self.units is None else dict.fromkeys(range(self.layers), self.units),
        )
        rules = Rules(
            offers=self.offers(policy),
            options=self.options,
            num_slots=num_slots,
            check_ledger=True,
            summarizes=self.summarizes(),
            **self.host_memory(),
        )
        arguments = (model, rules, self._arrival_of, self.finished.append)
        return build_cache(*arguments, self.trace_file())

    def offers(self, policy: str) -> list[Offer]:
        """The policies that clients may have; the first is that of all that have no own terms."""
        made = make_policy(policy, self.options, self.quota.page_tokens)
        return [Offer(made, Terms(policy=policy, quota=self.quota), self.quota)]

    def _arrival_of(self, new: SimpleNamespace) -> Arrival:
        return Arrival(new.terms, parent_of(new.req_id))

    def terms_of(self, client: Client) -> Terms:
        return client.terms or self.cache.slots.rules.offers[0].terms

    def quota_of(self, client: Client) -> Quota:
        return self.terms_of(client).quota

    def policy_of(self, client: Client) -> Policy:
        return self.cache.slots.rules.policies[self.terms_of(client).policy]

    def summarizes(self) -> bool:
        """Whether it is counted what clients keep of their prompts."""
        return False

    def trace_file(self) -> Path | None:
        """Where the stories of clients go."""
        return None

    def host_memory(self) -> dict[str, int]:
        """Fields of the rules that say what keeps dropped tokens."""
        return {}

    def rotaries(self) -> dict[int, Rotary]:
        """The embedding of each layer; all share one."""
        return dict.fromkeys(range(self.layers), self.rotary)

    @property
    def rotary(self) -> Rotary:
        """How the lab's queries and keys are turned."""
        return Rotary(self.rope_base ** -torch.linspace(0, 1, self.head_size // 2), True)

    @property
    def policy(self) -> Policy:
        return self.cache.slots.rules.offers[0].policy

    def state(self, client: Client) -> RequestState:
        """What the worker knows of a client that holds a slot."""
        return self.cache.slots.requests[client.request_id]

    # --- what the engine core does -------------------------------------------------------------

    def blocks_needed(self, client: Client, seen_tokens: int) -> int:
        return self.quota_of(client).blocks_for(seen_tokens, client.prompt_tokens)

    def room(self, client: Client) -> int:
        """Most tokens of its next chunk, which may be any part of the prompt."""
        if not client.blocks:
            self.arrive(client)
        start, prompt_tokens = client.computed_tokens, client.prompt_tokens
        quota = self.quota_of(client)
        for end_tokens in (quota.chunks_end(prompt_tokens), prompt_tokens):
            if start < end_tokens:
                return min(quota.chunk_tokens - client.lead_tokens, end_tokens - start)
        return min(quota.next_stop(start, prompt_tokens), client.total_tokens) - start

    def arrive(self, client: Client) -> None:
        """A client may be admitted with the next step: it begins behind what is there of it."""

    def host_place(self, client: Client) -> HostPlace | None:
        """Where host memory keeps the prompt of a client that is admitted."""
        return None

    def take_blocks(self, client: Client, seen_tokens: int) -> list[int] | None:
        """Give the client what it needs to have seen so many tokens; None if the pool is out."""
        missing = self.blocks_needed(client, seen_tokens) - len(client.blocks)
        if missing > len(self.free_blocks):
            return None
        taken = [self.free_blocks.pop(0) for _ in range(max(0, missing))]
        client.blocks += taken
        return taken

    def give_blocks(self, client: Client) -> None:
        self.free_blocks += client.blocks
        client.blocks = []
        client.computed_tokens = 0

    def step(
        self,
        work: dict[Client, int],
        *,
        finished: tuple[str, ...] = (),
        preempted: tuple[str, ...] = (),
    ) -> Step | None:
        """Run one step in which every client of `work` computes so many tokens."""
        self.gone.update(finished)
        scheduled = SimpleNamespace(
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted),
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[],
                resumed_req_ids=set(),
                new_block_ids=[],
                num_computed_tokens=[],
                num_output_tokens=[],
            ),
            num_scheduled_tokens={},
            kv_connector_metadata=SimpleNamespace(places={}),
        )
        for client, num_tokens in work.items():
            self._schedule(scheduled, client, num_tokens)
        self.cache.begin_step(scheduled)
        step = self.forward(work) if work else None
        self.cache.end_step()
        for client, num_tokens in work.items():
            client.computed_tokens += num_tokens
            client.lead_tokens = 0
            if client.computed_tokens == client.total_tokens:
                client.output_tokens += 1
        return step

    def _schedule(self, scheduled: SimpleNamespace, client: Client, num_tokens: int) -> None:
        fresh = not client.blocks
        if fresh and (place := self.host_place(client)) is not None:
            scheduled.kv_connector_metadata.places[client.request_id] = place
        taken = self.take_blocks(client, client.computed_tokens + num_tokens)
        assert taken is not None, "the test must not schedule what the pool cannot hold"
        assert len(client.blocks) <= self.quota_of(client).blocks
        if fresh and not client.was_admitted:
            client.was_admitted = True
            scheduled.scheduled_new_reqs.append(client.as_new(self.terms_of(client)))
        else:
            cached = scheduled.scheduled_cached_reqs
            cached.req_ids.append(client.request_id)
            cached.new_block_ids.append((taken,) if taken else None)
            cached.num_computed_tokens.append(client.computed_tokens)
            cached.num_output_tokens.append(client.output_tokens)
            if fresh:
                cached.resumed_req_ids.add(client.request_id)
        scheduled.num_scheduled_tokens[client.request_id] = num_tokens

    # --- what the model does --------------------------------------------------------------------

    def forward(self, work: dict[Client, int]) -> Step:
        rows = sorted(work, key=lambda client: work[client])
        starts = torch.tensor([0, *(work[c] for c in rows)]).cumsum(0)
        pictures = {row: client.pictures for row, client in enumerate(rows)}
        step = self.cache.open_step([c.request_id for c in rows], starts, pictures)
        positions = [torch.arange(work[c]) + c.computed_tokens for c in rows]
        step.see_positions(torch.cat(positions).expand(3, -1))
        for layer in range(self.layers):
            parts = [self.project(c, layer, c.computed_tokens, work[c]) for c in rows]
            query, key, value = (torch.cat(part) for part in zip(*parts, strict=True))
            for client, (_, keys, values) in zip(rows, parts, strict=True):
                self._remember(client, layer, *self.kept(keys, values))
            expected = self._expected(rows, starts, layer, query, *self.kept(key, value))
            out = torch.full_like(query, torch.nan)
            self.run_layer(step, layer, query, key, value, out)
            assert not out.isnan().any()
            if self.reads_all_pages or not step.num_retrieving_rows:
                # what recalls is checked by who knows what came back
                first = int(starts[step.num_recalling_rows])
                torch.testing.assert_close(out[first:], expected[first:], rtol=1e-4, atol=1e-4)
            for row, client in enumerate(rows):
                self.see(client, layer, out[int(starts[row]) : int(starts[row + 1])])
                self.check_content(client, layer)
                self.check_budget(client, layer)
        return step

    def run_layer(self, step: Step, layer: int, *tensors: torch.Tensor) -> None:
        """What the model's layer calls with query, key, value and out."""
        step.run_layer(f"layer{layer}", *tensors)

    def project(
        self, client: Client, layer: int, first: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated query [count, Hq, D] and key, and value [count, H, D], of tokens from `first`."""
        query = self.randn(count, self.heads * self.group)
        return query, self.randn(count, self.heads), self.randn(count, self.heads)

    def see(self, client: Client, layer: int, out: torch.Tensor) -> None:
        """Look at the output [count, Hq, D] of a client's tokens."""

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.head_size, generator=self.generator)

    def kept(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of keys and values, [n, H, D], once they are stored."""
        return self.read(*(quantise(key, value, *self.units) if self.units else (key, value)))

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What stored keys and values stand for."""
        pairs = zip((key, value), self.units or (1.0, 1.0), strict=True)
        key, value = (tokens.float() * unit for tokens, unit in pairs)
        return key, value

    def _remember(self, client: Client, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        name = (client.request_id, layer)
        old = self.shadow.get(name)
        fresh = torch.stack((key, value), dim=1)
        kept = old[: client.computed_tokens] if old is not None else fresh[:0]
        self.shadow[name] = torch.cat((kept, fresh))

    def held(self, client: Client, layer: int, head: int) -> torch.Tensor:
        """Logical positions of the tokens that a head holds, in order."""
        request, tables = self.state(client), self.cache.tables
        count = int(tables.lens[request.slot, layer, head])
        page_tokens = self.quota.page_tokens
        pages = tables.page_table[request.slot, layer, head, : -(-count // page_tokens)].long()
        return self.pool.positions[pages].flatten()[:count].long()

    def attended(self, client: Client, layer: int, head: int) -> torch.Tensor:
        """Logical positions that the next tokens of a head attend to, themselves left out."""
        held = self.held(client, layer, head)
        state = self.state(client)
        lead = torch.arange(state.held_tokens, state.computed_tokens)
        return torch.cat((held, lead))

    def _expected(
        self,
        rows: list[Client],
        starts: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Dense attention over what is held and the new tokens."""
        out = torch.empty_like(query)
        for row, client in enumerate(rows):
            part = slice(int(starts[row]), int(starts[row + 1]))
            for head in range(self.heads):
                seen = self.attended(client, layer, head)
                old = self.shadow[client.request_id, layer][seen, :, head]
                keys = torch.cat((old[:, 0], key[part, head]))
                values = torch.cat((old[:, 1], value[part, head]))
                heads = slice(head * self.group, (head + 1) * self.group)
                logits = torch.einsum("tgd,nd->gtn", query[part, heads], keys)
                hidden = client.hidden_tokens(len(seen), logits.shape[1])
                logits = (logits * self.head_size**-0.5).masked_fill(hidden, -torch.inf)
                mixed = torch.einsum("gtn,nd->tgd", logits.softmax(-1), values)
                out[part, heads] = mixed
        return out

    def check_content(self, client: Client, layer: int) -> None:
        """Every held token is the one that was written at its position, in order, bit by bit."""
        request, tables = self.state(client), self.cache.tables
        for head in range(self.heads):
            positions = self.held(client, layer, head)
            recalled = self.num_recalled(client, layer, head)
            assert (positions[recalled:].diff() > 0).all()
            count = len(positions)
            pages = tables.page_table[
                request.slot, layer, head, : -(-count // self.quota.page_tokens)
            ]
            keys = self.pool.keys[pages.long()].flatten(0, 1)[:count]
            values = self.pool.values[pages.long()].flatten(0, 1)[:count]
            keys, values = self.read(keys, values)
            shadow = self.shadow[client.request_id, layer][positions, :, head]
            assert torch.equal(keys, shadow[:, 0])
            assert torch.equal(values, shadow[:, 1])

    def num_recalled(self, client: Client, layer: int, head: int) -> int:
        """Tokens in front of those that a head keeps."""
        return 0

    def check_budget(self, client: Client, layer: int) -> None:
        """A layer that has just been compressed holds its budget at most, and not much less."""
        plan = self.cache.plans[client.request_id]
        if not plan.compress:
            return
        lens = self.cache.tables.lens[plan.request.slot, layer]
        held_tokens = int(lens.sum())
        terms, quota = plan.request.terms, plan.request.quota
        pinned_tokens = terms.pinned.count_before(plan.stop_tokens) * self.heads
        assert int(lens.max()) <= quota.max_head_tokens
        layer_budgets = plan.request.layer_budgets
        if layer_budgets is not None:
            assert held_tokens <= layer_budgets.caps[layer] * self.heads + pinned_tokens
            assert sum(layer_budgets.caps) <= quota.budget_tokens * self.layers
            return
        room = quota.recall_room(client.prompt_tokens)
        takes_room = room is not None and plan.request.in_tier and plan.ends_chunks
        average_tokens = room.resident_tokens if takes_room else quota.budget_tokens
        budget_tokens = average_tokens * self.heads
        assert held_tokens <= budget_tokens + pinned_tokens
        # dynamic heads round down to whole pages
        slack_tokens = self.heads * self.quota.page_tokens
        assert held_tokens > min(budget_tokens, plan.stop_tokens * self.heads) - slack_tokens
