"""Random observations that hang together, as a worker would make them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from vllm_budgetkv.cache.spans import PromptSpans, VisionItem
from vllm_budgetkv.policy import Observation, Policy, PolicyOptions, Retention, make_policy

PAGE_TOKENS = 16
HEAD_SIZE = 8


def policy_for(name: str, options: PolicyOptions, num_heads: int, num_layers: int = 1) -> Policy:
    """The policy; one that needs a file of head scores gets falling ones."""
    if name == "sparsemm":
        scores_file = str(head_scores_file(num_layers, num_heads))
        options = replace(options, head_scores_file=scores_file)
    return make_policy(name, options, PAGE_TOKENS)


@cache
def head_scores_file(num_layers: int, num_heads: int) -> Path:
    """A file for `sparsemm`: the first head of the first layer has the largest score."""
    path = Path(mkdtemp()) / "scores.json"
    total = num_layers * num_heads
    flat = [float(total - index) ** 2 for index in range(total)]
    rows = [flat[index : index + num_heads] for index in range(0, total, num_heads)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Case:
    """Sizes of one observation; `Case(...).observe()` fills them with seeded random numbers."""

    seed: int = 0
    num_heads: int = 4
    group: int = 3
    seen_tokens: int = 700
    budget_tokens: int = 96
    max_head_tokens: int = 10_000
    held_share: float = 0.5
    frame_tokens: int = 20
    hints: bool = True
    layer: int = 0

    def spans(self) -> PromptSpans:
        """Text, a video, text, an image, text, an image directly behind it, text to the end."""
        prompt_tokens = self.seen_tokens + 30
        fifth = max(prompt_tokens // 5, 8)
        video = VisionItem(fifth // 4, fifth * 2, "video", min(self.frame_tokens, fifth * 2))
        first = VisionItem(video.stop + fifth // 3, fifth // 2, "image")
        second = VisionItem(first.stop + fifth // 4, fifth // 2, "image")
        third = VisionItem(second.stop, fifth // 4, "image")
        return PromptSpans(prompt_tokens, [video, first, second, third])

    def observe(self) -> Observation:
        generator = torch.Generator().manual_seed(self.seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator)

        shape = (self.num_heads, self.seen_tokens)
        keep = rand(*shape) < self.held_share + 0.3 * (rand(self.num_heads, 1) - 0.5)
        keep[:, -8:] = True
        lens = keep.sum(dim=1)
        width = int(lens.max())
        padding = 5 * (self.seed % 2)
        positions = torch.full((self.num_heads, width + padding), -1, dtype=torch.int32)
        for head in range(self.num_heads):
            positions[head, : lens[head]] = keep[head].nonzero()[:, 0].int()
        held = positions >= 0
        mass = rand(*positions.shape) ** 6 * held
        spans = self.spans()
        span_ids, is_vision = spans.lookup(positions)
        frame_ids, patch_ids = spans.lookup_frames(positions)
        keys = torch.randn(*positions.shape, HEAD_SIZE, generator=generator) + 0.5
        return Observation(
            mass=mass / mass.sum(dim=1, keepdim=True),
            topk_mass=0.8 + 0.2 * rand(self.num_heads * self.group),
            value_norms=(rand(*positions.shape) + 0.5) * held,
            positions=positions,
            lens=lens.int(),
            is_vision=is_vision,
            span_ids=span_ids,
            seen_tokens=self.seen_tokens,
            protected_position=spans.trailing_frame_start(self.seen_tokens),
            budget_tokens=self.budget_tokens,
            max_head_tokens=self.max_head_tokens,
            was_static=rand(self.num_heads) < 0.5,
            text_tokens=spans.count_text(self.seen_tokens) if self.hints else None,
            span_tokens=spans.span_tokens(self.seen_tokens) if self.hints else None,
            keys=keys * held[..., None],
            contrast=2 * rand(*positions.shape) * held,
            frame_ids=frame_ids,
            patch_ids=patch_ids,
            num_patches=spans.num_patches,
            layer=self.layer,
            values=torch.randn(*positions.shape, HEAD_SIZE, generator=generator) * held[..., None],
        )


def kept_indices(retention: Retention, observation: Observation) -> list[list[int]]:
    """Indices that `select` keeps of every head: best by tier, score, recency; ascending."""
    kept = []
    for head, length in enumerate(observation.lens.tolist()):
        tiers, scores = retention.tiers[head].tolist(), retention.scores[head].tolist()
        order = sorted(range(length), key=lambda i: (tiers[i], scores[i], i), reverse=True)
        kept.append(sorted(order[: int(retention.budgets[head])]))
    return kept
