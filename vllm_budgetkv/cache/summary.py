"""What an answer says of its request: counted on the device, once, when its prompt has been read.

The counts stay there until the step's tokens are read, so that nothing waits for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from typing import Self

    from vllm_budgetkv.cache.requests import RequestState
    from vllm_budgetkv.cache.tables import HeadTables

CLASSES = ("static", "dynamic")
MODALITIES = ("text", "vision")
DIGITS = 4


@dataclass(frozen=True)
class Summary:
    """What the heads of this rank hold of one prompt.

    Args:
        seen_tokens: of its prompt; with recall its last token comes by itself, later.
        kept_tokens: int64 [2, 2], tokens of static and of dynamic heads, text and vision.
        num_heads: int64 [2], static and dynamic heads, of all layers.
        retained_mass: float32 [L], share of the probe's attention that each layer retained; None
            where no probe has asked.
        compressions: of the prompt.
        compression_seconds: of the host; on a GPU the time that launching takes.
        recall: whether dropped tokens come back, or why not.
        reused_tokens: of the prompt, that host memory had.
    """

    seen_tokens: int
    kept_tokens: torch.Tensor
    num_heads: torch.Tensor
    retained_mass: torch.Tensor | None
    compressions: int
    compression_seconds: float
    recall: str
    reused_tokens: int

    @classmethod
    def of(cls, request: RequestState, tables: HeadTables) -> Self:
        """Count what a request holds behind its last chunk."""
        slot, page_tokens = request.slot, tables.pool.layout.page_tokens
        longest_tokens = request.longest_head_tokens(0)
        pages = tables.page_table[slot, :, :, : ceil_div(longest_tokens, page_tokens)]
        positions = tables.pool.positions[pages.long()].flatten(2)
        index = torch.arange(positions.shape[-1], device=positions.device)
        is_held = index < tables.lens[slot, :, :, None]
        is_vision = request.spans.lookup(positions)[1] & is_held
        vision = is_vision.sum(dim=-1)
        by_modality = torch.stack((is_held.sum(dim=-1) - vision, vision), dim=-1)
        is_static = tables.is_static[slot]
        classes = torch.stack((is_static, ~is_static)).long()
        mass = request.retained_mass
        return cls(
            seen_tokens=request.computed_tokens,
            kept_tokens=torch.einsum("clh,lhm->cm", classes, by_modality),
            num_heads=classes.sum(dim=(1, 2)),
            retained_mass=None if mass is None else mass.clone(),
            compressions=request.compressions,
            compression_seconds=request.compression_seconds,
            recall=request.recall,
            reused_tokens=0 if request.host is None else request.host.num_tokens,
        )

    @property
    def evicted_tokens(self) -> dict[str, int]:
        """Tokens of the prompt that heads have not kept, summed over those of each class. Waits for
        the device."""
        kept, heads = self.kept_tokens.sum(dim=1).tolist(), self.num_heads.tolist()
        pairs = zip(CLASSES, heads, kept, strict=True)
        return {name: count * self.seen_tokens - tokens for name, count, tokens in pairs}

    def as_fields(self) -> dict[str, Any]:
        """For a client. Waits for the device."""
        kept, (num_static, num_dynamic) = self.kept_tokens.tolist(), self.num_heads.tolist()
        counts = zip(CLASSES, (num_static, num_dynamic), kept, strict=True)
        mass = None if self.retained_mass is None else self.retained_mass.mean().item()
        return {
            "kept_tokens_per_head": {
                name: {
                    modality: round(tokens / count, 1)
                    for modality, tokens in zip(MODALITIES, row, strict=True)
                }
                for name, count, row in counts
                if count
            },
            "heads": dict(zip(CLASSES, (num_static, num_dynamic), strict=True)),
            "dynamic_share": round(num_dynamic / (num_static + num_dynamic), DIGITS),
            "retained_mass": None if mass is None else round(mass, DIGITS),
            "prompt_compressions": self.compressions,
            "compression_ms": round(1000 * self.compression_seconds, 1),
            "recall": self.recall,
            "reused_tokens": self.reused_tokens,
        }
