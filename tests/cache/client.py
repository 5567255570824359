"""What the lab's scheduler knows of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.arithmetic.terms import Terms

LOOKAHEAD = "#ahead"


def parent_of(request_id: str) -> str | None:
    return request_id.removesuffix(LOOKAHEAD) if request_id.endswith(LOOKAHEAD) else None


@dataclass
class Feature:
    """A multimodal item as vLLM describes one, with frames of `frame_tokens`."""

    offset: int
    length: int
    frame_tokens: int
    modality: str = "video"

    @property
    def mm_position(self) -> SimpleNamespace:
        return SimpleNamespace(
            offset=self.offset,
            length=self.length,
            is_embed=None,
            get_num_embeds=lambda: self.length,
        )

    @property
    def data(self) -> dict[str, SimpleNamespace]:
        grid = torch.tensor([[self.length // self.frame_tokens, 2, 2 * self.frame_tokens]])
        return {"video_grid_thw": SimpleNamespace(data=grid)}


@dataclass(eq=False)
class Client:
    """What the scheduler knows of one request."""

    request_id: str
    prompt_tokens: int
    features: list[Feature] = field(default_factory=list)
    output_tokens: int = 0
    computed_tokens: int = 0
    lead_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    was_admitted: bool = False
    terms: Terms | None = None
    pictures: Sequence[Range] = ()
    """Those whose tokens attend to each other both ways."""

    def hidden_tokens(self, seen_tokens: int, num_tokens: int) -> torch.Tensor:
        """What the next tokens do not see of those seen and of themselves, bool [t, seen + t]."""
        hidden = torch.ones(num_tokens, seen_tokens + num_tokens).triu(seen_tokens + 1).bool()
        for first, stop in self.pictures:
            inside = slice(*(max(0, at - self.computed_tokens) for at in (first, stop)))
            hidden[inside, seen_tokens:][:, inside] = False
        return hidden

    def as_new(self, terms: Terms) -> SimpleNamespace:
        """The client as the scheduler tells the worker of it at first."""
        return SimpleNamespace(
            req_id=self.request_id,
            prompt_len=self.prompt_tokens,
            prefill_token_ids=None,
            prompt_token_ids=list(range(self.prompt_tokens)),
            mm_features=self.features,
            block_ids=(list(self.blocks),),
            num_computed_tokens=self.computed_tokens,
            terms=terms,
        )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens
