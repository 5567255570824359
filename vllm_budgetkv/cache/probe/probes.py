"""The probes of all requests: who needs one, which tokens enter, and how it asks a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_budgetkv.cache.probe.bank import BankWrite, ProbeBank, plan_writes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from vllm_budgetkv.cache.probe.bank import BankShape, Rotary
    from vllm_budgetkv.cache.requests import RequestState, RowPlan
    from vllm_budgetkv.policy import Policy, PolicyOptions

    Entry = tuple[RequestState, ProbeBank, BankWrite]


def asks_probe(policy: Policy) -> bool:
    """Whether queries score what a policy compresses."""
    return policy.compresses and policy.needs_scores


@dataclass(frozen=True)
class Probes:
    """Queries that score the cache, from the token that enters a bank to the layer that is asked.

    Args:
        options: how many queries they have.
        shape: of a bank.
        rotaries: rotary embedding of each layer; empty where nothing is turned.
        num_rows: rows of a batch.
        are_asked: whether the policy of any request may ask.
        seeds: banks that look-aheads filled, by the id of the request they are for.
        decode_queries: [L, R, Hq, D], what the layers of a decode step leave behind; L is 0 where
            no policy asks.
    """

    options: PolicyOptions
    shape: BankShape
    rotaries: Mapping[int, Rotary]
    num_rows: int
    are_asked: bool
    seeds: dict[str, ProbeBank] = field(default_factory=dict, init=False)
    decode_queries: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_layers = self.shape.num_layers if self.are_asked else 0
        queries = self.shape.queries(num_layers, self.num_rows)
        object.__setattr__(self, "decode_queries", queries)

    def new_bank(self, policy: Policy) -> ProbeBank:
        """An empty bank for one request under a policy."""
        return ProbeBank(self.shape, policy.probe_source.capacity_tokens(self.options))

    # --- which tokens enter ----------------------------------------------------------------------

    def plan(self, request: RequestState, start: int, stop: int) -> Sequence[int]:
        """Positions of a step's tokens whose queries join the request's bank, which it may get."""
        if not self._needs_bank(request, stop):
            return []
        if request.bank is None:
            request.ask_with(self.new_bank(request.policy))
        is_seeded = request.request_id in self.seeds
        source = request.policy.probe_source
        return source.positions(request.spans, start, stop, self.options, is_seeded)

    def _needs_bank(self, request: RequestState, stop_tokens: int) -> bool:
        if not asks_probe(request.policy):
            return False
        if request.parent_id is not None or request.policy.probe_source.asks_from_start:
            return True
        # a short prompt needs probes only once its output comes near the quota; where the prompt
        # itself does, all of its chunks give theirs, however they were cut
        near_tokens = max(stop_tokens, request.prompt_tokens)
        return near_tokens + self.options.probe_tokens > request.quota.tokens

    # --- seeds -----------------------------------------------------------------------------------

    def seed(self, request_id: str, bank: ProbeBank) -> None:
        """Give a request that comes the queries of what ran ahead of it."""
        self.seeds[request_id] = bank

    def seed_of(self, request_id: str) -> ProbeBank | None:
        """A copy of the request's seed, so that a preempted request finds it again."""
        seed = self.seeds.get(request_id)
        return seed.copy() if seed is not None else None

    def forget(self, request_id: str) -> None:
        """Drop the seed of a request that ended."""
        self.seeds.pop(request_id, None)

    def drop_seed(self, request: RequestState) -> None:
        """Let a request whose prompt was read ask with the text behind its pictures alone.

        What ran ahead of it asked the same, but saw nothing. Where that text is too short to be a
        question, what stands in front of the pictures still asks, as it ran ahead.
        """
        spans, bank = request.spans, request.bank
        sizes = (spans.prompt_tokens, spans.end_of_vision)
        if bank is not None and request.terms.asks_itself(*sizes):
            bank.keep_last(spans.prompt_tokens - spans.end_of_vision)

    # --- writing in a step -----------------------------------------------------------------------

    def open_writes(self, plans: Sequence[RowPlan], starts: Sequence[int]) -> list[Entry]:
        """Places in the banks for a batch's text tokens.

        Args:
            plans: of the rows.
            starts: first query token of each row.
        """
        entries = []
        for plan, start in zip(plans, starts, strict=False):
            bank = plan.request.bank
            if bank is not None and plan.bank_positions:
                shift = start - plan.request.computed_tokens
                entries.append((plan.request, bank, [p + shift for p in plan.bank_positions]))
        writes = plan_writes([(bank, tokens) for _, bank, tokens in entries])
        return [(*entry[:2], write) for entry, write in zip(entries, writes, strict=True)]

    def note_decode(self, layer: int, query: torch.Tensor) -> None:
        """Keep a decode step's queries of one layer, [R, Hq, D], without allocating."""
        if self.are_asked:
            self.decode_queries[layer, : query.shape[0]].copy_(query)

    def take_decode(self, writes: Sequence[Entry]) -> None:
        """Move what `note_decode` kept to the banks, behind the step."""
        for request, bank, write in writes:
            assert request.position_offset is not None
            position = request.position_offset + request.computed_tokens
            bank.take(write, self.decode_queries, position)

    # --- asking ----------------------------------------------------------------------------------

    def of(
        self, request: RequestState, layers: Sequence[int], seen_tokens: int
    ) -> Sequence[torch.Tensor | None]:
        """The request's probe in each layer, [M, Hq, D], turned to stand behind its tokens."""
        bank = request.bank
        if bank is None or not bank.size:
            return [None] * len(layers)
        assert request.position_offset is not None
        position = request.position_offset + seen_tokens
        # queries that never ran ahead are asked from where they stand
        turned = self.rotaries if request.policy.probe_source.runs_ahead else {}
        rotaries = [turned.get(layer) for layer in layers]
        if len(layers) > 1 and all(rotary is rotaries[0] for rotary in rotaries):
            neighbours = slice(layers[0], layers[-1] + 1)
            return bank.probe(neighbours, position, rotaries[0]).unbind()
        pairs = zip(layers, rotaries, strict=True)
        return [bank.probe(layer, position, rotary) for layer, rotary in pairs]
