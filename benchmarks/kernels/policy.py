"""What a policy decides between `score` and `select`, in plain torch and compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.compression import BUDGET_TOKENS, HELD_TOKENS, make_layers
from benchmarks.kernels.rows import Bench, Row, measure_row
from benchmarks.kernels.shapes import CHUNK_TOKENS, QWEN25_VL_7B
from benchmarks.kernels.timing import host_seconds
from benchmarks.kernels.work import Work
from vllm_budgetkv.cache.spans import PromptSpans, VisionItem
from vllm_budgetkv.policy import Observation, PolicyOptions, make_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.compression import Layers

TEXT_TOKENS, FRAME_TOKENS = 64, 256
# of one call, those of torch's sorts included
POLICY_LAUNCHES = 250
# read: mass, norms, contrast, positions, spans, kinds; written: scores, tiers
TOKEN_BYTES = 4 * 5 + 1 + 4 + 1


def policy(bench: Bench) -> Iterator[Row]:
    """`hybrid` on one layer of a 7B behind a chunk; `of_forward` counts all layers."""
    model = QWEN25_VL_7B
    layers = make_layers(bench, model, 1)
    observation = observe(layers, bench.device)
    retain = make_policy("hybrid", PolicyOptions(), bench.page_tokens).retain
    counted = Work(TOKEN_BYTES * layers.cache.head_tokens)
    flops = model.forward_flops(CHUNK_TOKENS, BUDGET_TOKENS + CHUNK_TOKENS / 2)
    forward_seconds = flops / bench.ceilings.matmul_flops_per_second
    compiled = torch.compile(retain, fullgraph=True, dynamic=True)
    for name, function in (("plain", retain), ("compiled", compiled)):
        run = partial(function, observation)
        case = f"{name}, {model.name}, {HELD_TOKENS:,} tokens"
        row = measure_row(bench, "policy", case, run, counted)
        figures = {
            "of_forward": row.seconds * model.layers / forward_seconds,
            "host_seconds": host_seconds(run, POLICY_LAUNCHES),
        }
        yield replace(row, figures=figures)


def observe(layers: Layers, device: torch.device) -> Observation:
    """What a policy is told of the first layer: some text, then a video, then the chunk's end."""
    mass, topk_mass, value_norms, positions = layers.score(0)
    seen_tokens = int(positions.max()) + 1
    video = VisionItem(TEXT_TOKENS, seen_tokens - TEXT_TOKENS, "video", FRAME_TOKENS)
    spans = PromptSpans(seen_tokens + TEXT_TOKENS, (video,), device)
    span_ids, is_vision = spans.lookup(positions)
    return Observation(
        mass=mass,
        topk_mass=topk_mass,
        value_norms=value_norms,
        positions=positions,
        lens=layers.cache.lens[0],
        is_vision=is_vision,
        span_ids=span_ids,
        seen_tokens=seen_tokens,
        protected_position=spans.trailing_frame_start(seen_tokens),
        budget_tokens=BUDGET_TOKENS,
        max_head_tokens=2 * BUDGET_TOKENS,
        was_static=torch.ones_like(layers.cache.lens[0], dtype=torch.bool),
        text_tokens=spans.count_text(seen_tokens),
        span_tokens=spans.span_tokens(seen_tokens),
        contrast=layers.contrast(0),
    )
