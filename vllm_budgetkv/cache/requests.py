"""What the worker knows of each request on the host. Every number here is arithmetic, none is read
back from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.arithmetic.layer_budgets import LayerBudgets
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.recall import RecallRoom
    from vllm_budgetkv.arithmetic.terms import Terms
    from vllm_budgetkv.cache.probe.bank import ProbeBank
    from vllm_budgetkv.cache.spans import PromptSpans
    from vllm_budgetkv.policy import Policy


@dataclass
class RequestState:
    """One request that has a slot. It changes through its own methods alone.

    Args:
        request_id: its id in the engine.
        slot: its row of the tables.
        terms: what it is held to.
        policy: chooses what it keeps.
        spans: which prompt positions are vision and which text.
        blocks: block ids it holds, in order.
        computed_tokens: tokens seen before this step.
        parent_id: the request that it runs ahead of; None for a client's request.
        host: where host memory keeps its prompt; None if it does not.
        shared: whether its head-pages are shared between its heads (else identity).
        lead_tokens: of the tokens seen, the last that no layer holds yet: each takes them from host
            memory in front of the chunk that they begin.
        grown_tokens: tokens appended since its last compression.
        compressions: how often its last layer was compressed, and so every other, but where chunks
            were joined in a replay: then others less often.
        first_compression: how many of them were of what its heads held before they held nothing.
        compression_seconds: of the host; on a GPU the time that launching takes.
        has_digests: whether its digests are valid, so that decode may read some pages only.
        recalls: whether some of its heads bring tokens back from host memory.
        postponed: whether its heads hold nothing of its prompt until what stays is chosen.
        unchosen: whether what stays of its prompt is still to be chosen, behind the first token of
            the answer.
        bank: its probe queries; None until it needs some.
        position_offset: int64 scalar on the device: what the rotary position of its next token is
            beyond the token's index. Text alone follows the prompt, so decode leaves it.
        layer_budgets: what each layer may hold now; None if all layers are equal.
        retained_mass: float32 [L] on the device: share of the probe's attention that was retained,
            multiplied over the compressions since its heads hold what they hold; None if nobody
            asks.
    """

    request_id: str
    slot: int
    terms: Terms
    policy: Policy
    spans: PromptSpans
    blocks: list[int]
    computed_tokens: int
    parent_id: str | None = None
    bank: ProbeBank | None = None
    host: HostPlace | None = None
    shared: bool = field(default=False, init=False)
    lead_tokens: int = field(default=0, init=False)
    grown_tokens: int = field(default=0, init=False)
    compressions: int = field(default=0, init=False)
    first_compression: int = field(default=0, init=False)
    compression_seconds: float = field(default=0.0, init=False)
    has_digests: bool = field(default=False, init=False)
    recalls: bool = field(default=False, init=False)
    postponed: bool = field(default=False, init=False)
    unchosen: bool = field(default=False, init=False)
    position_offset: torch.Tensor | None = field(default=None, init=False)
    layer_budgets: LayerBudgets | None = field(default=None, init=False)
    retained_mass: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.host is not None:
            sizes = (self.prompt_tokens, self.host.found_tokens, self.spans.end_of_vision)
            self.unchosen = self.quota.streams
            self.postponed = self.quota.postpones(*sizes)

    @property
    def quota(self) -> Quota:
        """What it may hold."""
        return self.terms.quota

    @property
    def has_classes(self) -> bool:
        """Whether its heads have been classified."""
        return self.compressions > self.first_compression

    @property
    def in_tier(self) -> bool:
        """Whether host memory keeps its prompt."""
        return self.host is not None

    @property
    def held_tokens(self) -> int:
        """Tokens that every layer has been given, whether they stayed or not."""
        return self.computed_tokens - self.lead_tokens

    @property
    def recall_room(self) -> RecallRoom | None:
        """What recall takes of its quota behind the prompt; None if nothing comes back."""
        return self.quota.recall_room(self.prompt_tokens) if self.in_tier else None

    @property
    def recall(self) -> str:
        """Whether dropped tokens come back behind its prompt, or why not."""
        if self.quota.recall is None:
            return "off"
        if not self.quota.compresses_prompt(self.prompt_tokens):
            return "not needed"
        if self.quota.recall_room(self.prompt_tokens) is None:
            return "index too large"
        return "on" if self.in_tier else "no room"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt; what follows is output, whether decoded or computed again."""
        return self.spans.prompt_tokens

    def in_prefill(self, start_tokens: int) -> bool:
        return start_tokens < self.prompt_tokens

    def longest_head_tokens(self, num_tokens: int) -> int:
        """Upper bound of any head's length once `num_tokens` more are appended."""
        seen_tokens = self.computed_tokens + num_tokens
        if not self.has_classes:
            return seen_tokens
        return min(seen_tokens, self.quota.max_head_tokens + self.grown_tokens + num_tokens)

    def grow(self, blocks: Sequence[int]) -> None:
        """Hold more blocks.

        Raises:
            RuntimeError: it holds its whole quota already.
        """
        if self.shared:
            raise RuntimeError(
                f"request {self.request_id} shares its head-pages, so it already holds its quota "
                f"of {self.quota.blocks} blocks, but it was given {len(blocks)} more"
            )
        self.blocks += blocks

    def share(self, layer_budgets: LayerBudgets | None) -> None:
        """Leave the identity state, before the first compression."""
        self.shared = True
        self.layer_budgets = layer_budgets

    def ask_with(self, bank: ProbeBank) -> None:
        """Keep probe queries in `bank` from now on."""
        self.bank = bank

    def stand_at(self, position_offset: torch.Tensor) -> None:
        """Note how far rotary positions are beyond the indices of the next tokens."""
        self.position_offset = position_offset

    def claim_tokens(self, layer: int, *, last: bool) -> int:
        """Tokens per head, on average, that a layer may keep of the compression that begins.

        Args:
            layer: its index.
            last: whether decode follows, so that recall takes its room.
        """
        if self.layer_budgets is None:
            room = self.recall_room if last else None
            return self.quota.budget_tokens if room is None else room.resident_tokens
        return self.layer_budgets.claim(layer)

    def watch_mass(self, retained_mass: torch.Tensor) -> None:
        """Note from now on how much of the probe's attention is retained."""
        self.retained_mass = retained_mass

    def spend(self, seconds: float) -> None:
        """Add to the time that its compressions took."""
        self.compression_seconds += seconds

    def advance(self, num_tokens: int) -> None:
        """Tokens were appended to every head."""
        self.computed_tokens += num_tokens
        self.grown_tokens += num_tokens
        self.lead_tokens = 0

    def restart(self) -> None:
        """Its heads hold nothing, though it has seen its prompt; its pages are nobody's yet."""
        self.computed_tokens = self.grown_tokens = self.lead_tokens = 0
        self.shared = self.postponed = self.unchosen = False
        # its heads are classified anew, as those of a request that has seen nothing
        self.first_compression = self.compressions

    def skip(self, num_tokens: int) -> None:
        """Tokens were seen that no layer is given, since what stays of them is chosen later."""
        self.computed_tokens += num_tokens

    def rewind(self, compressions: int) -> None:
        """The next layer is filled from the first token, as often compressed as it was before."""
        self.computed_tokens = self.grown_tokens = 0
        self.compressions = compressions

    def lead(self, num_tokens: int) -> None:
        """Tokens were seen that each layer takes from host memory in front of the next chunk."""
        self.advance(num_tokens)
        self.lead_tokens = num_tokens

    def bring_back(self) -> None:
        """Some of its heads bring tokens back from now on."""
        self.recalls = True

    def compressed(self, *, has_digests: bool) -> None:
        """All layers were compressed."""
        self.grown_tokens = 0
        self.compressions += 1
        self.has_digests = has_digests


@dataclass
class RowPlan:
    """What one request does in this step.

    Args:
        request: the request.
        num_tokens: its tokens in this step.
        compress: whether each layer is compressed after its attention.
        bank_positions: positions in the request of the tokens that enter its bank.
    """

    request: RequestState
    num_tokens: int
    compress: bool = False
    bank_positions: Sequence[int] = ()

    @property
    def forgets(self) -> bool:
        """Whether each layer holds nothing of its tokens behind their attention."""
        return self.request.postponed

    @property
    def stop_tokens(self) -> int:
        """Tokens of the request that have been seen behind this step."""
        return self.request.computed_tokens + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether one generated token, new or computed again, is appended to every head."""
        return self.num_tokens == 1 and not self.request.in_prefill(self.request.computed_tokens)

    @property
    def streaming_tokens(self) -> int:
        """Its last tokens that attend to all of their prompt that was seen, held or not."""
        request, recall = self.request, self.request.quota.recall
        if recall is None or not request.in_prefill(request.computed_tokens):
            return 0
        if request.postponed:
            return self.num_tokens
        if not (request.in_tier and request.has_classes):
            return 0
        sizes = (request.prompt_tokens, request.spans.end_of_vision)
        return min(self.num_tokens, max(0, self.stop_tokens - recall.question_start(*sizes)))

    @property
    def ends_prefill(self) -> bool:
        """Whether decode follows this step."""
        start_tokens = self.request.computed_tokens
        return self.request.in_prefill(start_tokens) and not self.request.in_prefill(
            self.stop_tokens
        )

    @property
    def ends_chunks(self) -> bool:
        """Whether this step's chunk is the last that is compressed as part of a prompt."""
        request = self.request
        end_tokens = request.quota.chunks_end(request.prompt_tokens)
        return request.computed_tokens < end_tokens <= self.stop_tokens
