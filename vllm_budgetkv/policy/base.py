"""What a policy is told and what it answers.

A policy is pure maths on tensors: it knows no page, no pool and no engine. It is asked about one
layer of one request at a time, after each prefill chunk and every few tokens of decode. Its answer
stays on the device: a policy never reads a tensor back to the host, so no `item()`, no tensor in
an `if`, and no loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.policy.options import PolicyOptions


class Tier(IntEnum):
    """Ranks of tokens. A token of a higher tier always stays before one of a lower tier."""

    NOT_HELD = 0
    SCORED = 1
    TEXT = 2
    FRAME = 3
    RECENT = 4
    SINK = 5


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All tokens that one layer of one request holds. H KV heads, Hq query heads, n padded tokens.

    Attributes:
        mass: float32 [H, n], mean attention of the probe per token, 0 beyond `lens`; None if the
            policy needs no scores or if there is no probe yet.
        topk_mass: float32 [Hq], mean over the probe's rows of the top-k mass with the sinks taken
            out; query heads of one KV head are neighbours. None together with `mass`.
        value_norms: float32 [H, n], L2 norm of each value, 0 beyond `lens`, or None.
        positions: int32 [H, n], logical index of each token, ascending, -1 beyond `lens`.
        lens: int32 [H], tokens that each head holds.
        is_vision: bool [H, n], False beyond `lens`.
        span_ids: int32 [H, n], index of the token's span; ascending, as text and vision alternate;
            0 beyond `lens`.
        seen_tokens: tokens of the request so far, held or not.
        protected_position: positions from here on belong to a frame that the chunk's end cuts;
            `seen_tokens` when none is cut.
        budget_tokens: tokens per head, on average over the heads of this layer.
        max_head_tokens: no head may keep more.
        was_static: bool [H], the class of each head at the last call; None at the first.
        text_tokens: upper bound of the text tokens that a head can hold; it only saves time. None
            if unknown.
        span_tokens: int32 [number of spans], tokens of each span seen so far, held or not. None if
            unknown: then the tokens that a head still holds count as the span.
    """

    mass: torch.Tensor | None
    topk_mass: torch.Tensor | None
    value_norms: torch.Tensor | None
    positions: torch.Tensor
    lens: torch.Tensor
    is_vision: torch.Tensor
    span_ids: torch.Tensor
    seen_tokens: int
    protected_position: int
    budget_tokens: int
    max_head_tokens: int
    was_static: torch.Tensor | None = None
    text_tokens: int | None = None
    span_tokens: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """H KV heads and n padded tokens."""
        num_heads, num_tokens = self.positions.shape
        return num_heads, num_tokens

    @property
    def fits(self) -> bool:
        """True if the host can tell that nothing has to go, however the heads share."""
        return self.shape[1] <= min(self.budget_tokens, self.max_head_tokens)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which tokens stay: of each head the `budgets` best by tier, then score, then recency.

    Attributes:
        scores: float32 [H, n], higher stays; 0 beyond the held tokens.
        tiers: uint8 [H, n] of `Tier`.
        budgets: int32 [H], at most the tokens held and at most `max_head_tokens`; their sum is at
            most H * `budget_tokens`.
        is_static: bool [H], class of each head; only dynamic heads retrieve at decode.
    """

    scores: torch.Tensor
    tiers: torch.Tensor
    budgets: torch.Tensor
    is_static: torch.Tensor


class Policy(Protocol):
    """One way to choose the tokens that stay. Stateless: the state is in the `Observation`."""

    name: ClassVar[str]
    """What the user types."""
    needs_scores: ClassVar[bool]
    """Whether the probe must be scored before `retain` is called."""
    compresses: ClassVar[bool]
    """False for a policy that never drops a token; `retain` is then not called."""

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        """Take the validated options and the tokens of a page; ValueError if they do not fit."""

    def retain(self, observation: Observation) -> Retention:
        """Answer which tokens stay. Mutates nothing and does not wait for the device."""
