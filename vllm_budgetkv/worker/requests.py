"""What the worker knows of each request on the host. Every number here is arithmetic, none is read
back from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.layer_budgets import LayerBudgets
    from vllm_budgetkv.quota import Quota
    from vllm_budgetkv.spans import PromptSpans
    from vllm_budgetkv.worker.bank import ProbeBank
    from vllm_budgetkv.worker.report import RequestRecord


@dataclass
class RequestState:
    """One request that has a slot.

    Args:
        request_id: its id in the engine.
        slot: its row of the tables.
        quota: what it may hold.
        spans: which prompt positions are vision and which text.
        blocks: block ids it holds, in order.
        computed_tokens: tokens seen before this step.
        shared: whether its head-pages are shared between its heads (else identity).
        grown_tokens: tokens appended since its last compression.
        has_classes: whether its heads have been classified.
        retrieves: whether its digests are valid, so that decode may read some pages only.
        bank: its probe queries; None until it needs some.
        position_offset: int64 scalar on the device: what the rotary position of its next token is
            beyond the token's index. Text alone follows the prompt, so decode leaves it.
        layer_budgets: what each layer may hold now; None if all layers are equal.
    """

    request_id: str
    slot: int
    quota: Quota
    spans: PromptSpans
    blocks: list[int]
    computed_tokens: int
    record: RequestRecord
    shared: bool = False
    grown_tokens: int = 0
    has_classes: bool = False
    retrieves: bool = False
    bank: ProbeBank | None = None
    position_offset: torch.Tensor | None = None
    layer_budgets: LayerBudgets | None = None

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
    bank_positions: list[int] = field(default_factory=list)

    @property
    def stop_tokens(self) -> int:
        """Tokens of the request that have been seen behind this step."""
        return self.request.computed_tokens + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether one generated token, new or computed again, is appended to every head."""
        return self.num_tokens == 1 and not self.request.in_prefill(self.request.computed_tokens)

    @property
    def ends_prefill(self) -> bool:
        """Whether decode follows this step."""
        start_tokens = self.request.computed_tokens
        return self.request.in_prefill(start_tokens) and not self.request.in_prefill(
            self.stop_tokens
        )
