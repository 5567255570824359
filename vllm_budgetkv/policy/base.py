"""What a policy is told and what it answers.

A policy is pure maths on tensors: it knows no page, no pool and no engine. It is asked about one
layer of one request at a time, after each prefill chunk and every few tokens of decode. Its answer
stays on the device: a policy never reads a tensor back to the host, so no `item()`, no tensor in
an `if`, and no loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Protocol

from vllm_budgetkv.policy.option import refuse_foreign
from vllm_budgetkv.policy.probe_source import ProbeSource, PromptText

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.policy.options import PolicyOptions


MergeMode = Literal["average", "pivot", "weighted", "value"]
"""How tokens that are dropped are merged into kept ones; `ops.merge` has the formulas."""


class Tier:
    """Ranks of tokens. A token of a higher tier always stays before one of a lower tier.

    Plain numbers and no enum: `torch.compile` does not compare a tensor with a member of one.
    """

    NOT_HELD: Final = 0
    SCORED: Final = 1
    UNLIKE: Final = 2
    TEXT: Final = 3
    FRAME: Final = 4
    RECENT: Final = 5
    SINK: Final = 6
    PINNED: Final = 7


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All tokens that one layer of one request holds. H KV heads, Hq query heads, n padded tokens.

    A policy that `takes_layers` may be told of L layers at once: then L stands in front of every
    shape but that of `span_tokens`, and in front of those of its answer.

    Attributes:
        mass: float32 [H, n], attention of the probe per token, 0 beyond `lens`: the mean over its
            rows, or the largest if the policy `takes_largest`, and of that the mean over the query
            heads of the KV head. None if the policy needs no scores or if there is no probe yet.
        topk_mass: float32 [Hq], mean over the probe's rows of the top-k mass with the sinks taken
            out; query heads of one KV head are neighbours. None together with `mass`.
        value_norms: float32 [H, n], L2 norm of each value, 0 beyond `lens`, or None if the policy
            needs neither scores nor the norms.
        keys: computed dtype [H, n, D], rotated as they are stored, 0 beyond `lens`; None
            unless the policy needs keys.
        values: computed dtype [H, n, D], 0 beyond `lens`; None unless the policy needs them.
        contrast: float32 [H, n], 1 - cos of each key with the mean of the head's normalised keys, 0
            beyond `lens`; None unless the policy needs it.
        frame_ids: int32 [H, n], number of the token's frame in the prompt; -1 for text and beyond
            `lens`. None unless the policy needs frames.
        patch_ids: int32 [H, n], place of a vision token in its frame; equal ids mean the same place
            of frames with equally many tokens. 0 for text. None together with `frame_ids`.
        num_patches: patch ids are below it.
        layer: index of the layer, of the first of several.
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

    mass: torch.Tensor | None = None
    topk_mass: torch.Tensor | None = None
    value_norms: torch.Tensor | None = None
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
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    frame_ids: torch.Tensor | None = None
    patch_ids: torch.Tensor | None = None
    num_patches: int = 0
    layer: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """H KV heads and n padded tokens."""
        num_heads, num_tokens = self.positions.shape[-2:]
        return num_heads, num_tokens

    @property
    def concentration(self) -> torch.Tensor | None:
        """float32 [H]: top-k mass of the least concentrated query head of each KV head."""
        if self.topk_mass is None:
            return None
        return self.topk_mass.unflatten(-1, (self.shape[0], -1)).amin(dim=-1)

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
        merge: how the tokens that go are merged into those that stay; None loses them.
    """

    scores: torch.Tensor
    tiers: torch.Tensor
    budgets: torch.Tensor
    is_static: torch.Tensor
    merge: MergeMode | None = None


class Policy(Protocol):
    """One way to choose the tokens that stay. Stateless: the state is in the `Observation`.

    Policies inherit from this class for its defaults.
    """

    name: ClassVar[str]
    """What the user types."""
    needs_scores: ClassVar[bool]
    """Whether the probe must be scored before `retain` is called."""
    takes_largest: bool = False
    """Whether `mass` is the largest attention over the probe's rows instead of their mean. May be
    set in `__init__`, by an option."""
    probe_source: ClassVar[type[ProbeSource]] = PromptText
    """Whose queries are the probe; without meaning if no scores are needed."""
    needs_value_norms: ClassVar[bool] = False
    """Whether `value_norms` are needed also without a probe."""
    needs_keys: ClassVar[bool] = False
    """Whether `keys` must be gathered."""
    needs_values: ClassVar[bool] = False
    """Whether `values` must be gathered."""
    needs_contrast: bool = False
    """Whether `contrast` must be computed; if scores are needed, only beside them. An option that
    does without it sets this in `__init__`."""
    needs_frames: ClassVar[bool] = False
    """Whether `frame_ids` and `patch_ids` must be looked up."""
    retrieves: ClassVar[bool] = False
    """Whether it has dynamic heads, which read only some of their pages at decode."""
    takes_layers: ClassVar[bool] = False
    """Whether it answers for several layers of equal budgets at once, as for each of them."""
    compresses: ClassVar[bool]
    """False for a policy that never drops a token; `retain` is then not called."""

    @classmethod
    def check(cls, options: PolicyOptions, lookahead: bool = True) -> None:
        """Refuse, before anything starts, options with which the policy cannot serve.

        A policy that demands something overrides it and asks its base first.

        Args:
            options: each is in its range.
            lookahead: whether text may run ahead of a long prompt.

        Raises:
            ValueError: says in the user's words what to change.
        """
        refuse_foreign(options, (cls.name,))

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        """Take the checked options and the tokens of a page; ValueError if they do not fit it."""

    def layer_budgets(
        self, num_layers: int, num_heads: int, budget_tokens: int
    ) -> tuple[int, ...] | None:
        """Tokens per head, on average over its heads, that each layer should keep.

        Args:
            num_layers: L.
            num_heads: KV heads of this rank (H).
            budget_tokens: mean over the layers.

        Returns:
            L numbers whose sum is at most `num_layers * budget_tokens`; None for equal layers. A
            layer gets more than the mean only once others have given up as much.

        Raises:
            ValueError: the policy does not fit the model.
        """
        return None

    def retain(self, observation: Observation) -> Retention:
        """Answer which tokens stay. Mutates nothing and does not wait for the device."""
