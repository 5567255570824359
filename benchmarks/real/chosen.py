"""What a policy keeps of a recorded prompt: its own code, chunk by chunk, without pages.

The engine's cache computes keys behind a compressed context, here they are those of the full cache;
all else is as there: the chunks, the probe that runs ahead, the measures, the policy, the order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.cache.probe.rotation import rotate
from vllm_budgetkv.cache.spans import PromptSpans
from vllm_budgetkv.policy import Observation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.real.told import Memory, ToldModel
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.cache.spans import VisionItem
    from vllm_budgetkv.policy import Policy, PolicyOptions

LOOKAHEAD_TOKENS = 64


Probe = Literal["ahead", "replay", "true"]


@dataclass(frozen=True)
class Recorded:
    """A prompt, read once, and its right answer. a tokens of it, n of the prompt.

    Attributes:
        task: a key of `TASKS`.
        prompt, told: token ids.
        memory: of the prompt and of all but the last token of the answer, with the queries of the
            prompt's last `num_rows` tokens and of the a - 1 behind them.
        num_rows: most queries of a probe.
        question_tokens: at the prompt's end, which run ahead.
        ahead: float32 [L, question tokens, Hq, D], their queries, without what stands before.
        spans: which tokens of the prompt are vision.
        model: for what has to be asked again.
    """

    task: str
    prompt: list[int]
    told: list[int]
    memory: Memory
    num_rows: int
    question_tokens: int
    ahead: torch.Tensor
    spans: PromptSpans
    model: ToldModel

    @property
    def past(self) -> Memory:
        """Of the prompt alone."""
        return self.memory.first(len(self.prompt))

    @property
    def question_queries(self) -> torch.Tensor:
        """float32 [L, Hq, rows, D] of the last tokens of the prompt."""
        return self.memory.queries[:, :, : self.num_rows]

    @property
    def answer_queries(self) -> torch.Tensor:
        """float32 [L, Hq, a, D] of the steps that wrote the answer: its first token is due to the
        prompt's last."""
        return self.memory.queries[:, :, self.num_rows - 1 :]

    def probe(self, seen_tokens: int, source: Probe) -> torch.Tensor:
        """[L, rows, Hq, D] at the position behind the tokens that were seen.

        "ahead" are the queries of a look-ahead until the prompt has been read, "replay" those of
        the same text asked behind what was seen, "true" those that come in the end.
        """
        end, asked = len(self.prompt), self.question_tokens
        rows = min(self.num_rows, asked)
        if source == "true" or seen_tokens == end:
            queries, first = self.question_queries[:, :, -rows:].transpose(1, 2), end - rows
        elif source == "ahead":
            queries, first = self.ahead[:, -rows:], asked - rows
        else:
            text = self.prompt[-asked:]
            queries = self.model.ask(self.past.first(seen_tokens), text, rows).transpose(1, 2)
            first = seen_tokens + asked - rows
        distance = seen_tokens - torch.arange(first, first + rows)
        return rotate(queries, distance, self.model.inv_freq, is_neox=True)


def record(
    model: ToldModel,
    task: str,
    prompt: list[int],
    told: list[int],
    num_rows: int,
    items: Sequence[VisionItem] = (),
) -> Recorded:
    """Read a prompt with its answer, and the text behind its last item alone.

    Args:
        model: reads.
        task: a key of `TASKS`.
        prompt, told: token ids; what stands for a token of vision may be a word.
        num_rows: most queries of a probe.
        items: which tokens of the prompt are vision.
    """
    spans = PromptSpans(len(prompt), items)
    asked = min(LOOKAHEAD_TOKENS, len(prompt) - spans.end_of_vision)
    ahead = model.read(prompt[-asked:], asked).queries.transpose(1, 2)
    memory = model.read([*prompt, *told[:-1]], num_rows + len(told) - 1)
    return Recorded(task, prompt, told, memory, num_rows, asked, ahead, spans, model)


def keep(
    recorded: Recorded,
    policy: Policy,
    options: PolicyOptions,
    quota: Quota,
    budget_tokens: int,
    source: Probe = "ahead",
) -> torch.Tensor:
    """bool [L, H, n], what the policy holds when the prompt has been read.

    Args:
        recorded: the prompt.
        policy: asked behind every chunk, with its options.
        quota: says where chunks end.
        budget_tokens: per head, on average, that survive each time; may be less than the quota's.
        source: of the probe.
    """
    past = recorded.past
    num_tokens, layers = past.num_tokens, past.keys
    kept = torch.zeros(len(layers), layers[0].shape[0], num_tokens, dtype=torch.bool)
    classes: list[torch.Tensor | None] = [None] * len(layers)
    start = 0
    while start < num_tokens:
        stop = quota.next_stop(start, num_tokens)
        kept[:, :, start:stop] = True
        if stop > budget_tokens:
            probe = recorded.probe(stop, source)
            for layer in range(len(layers)):
                held = (recorded, layer, kept[layer], stop)
                seen = observe(*held, probe[layer], policy, options)
                seen = replace(
                    seen,
                    budget_tokens=budget_tokens,
                    max_head_tokens=2 * budget_tokens,
                    was_static=classes[layer],
                )
                answer = policy.retain(seen)
                stays = ops.select(answer.scores, answer.tiers, seen.lens, answer.budgets)
                positions = seen.positions.clamp(min=0).long()
                kept[layer] = torch.zeros_like(kept[layer]).scatter_add_(-1, positions, stays)
                classes[layer] = answer.is_static
        start = stop
    return kept


def observe(
    recorded: Recorded,
    layer: int,
    kept: torch.Tensor,
    seen_tokens: int,
    probe: torch.Tensor,
    policy: Policy,
    options: PolicyOptions,
) -> Observation:
    """What the policy is told of one layer; budgets are still to be filled in."""
    lens = kept.sum(dim=-1, dtype=torch.int32)
    longest, memory, spans = int(lens.max()), recorded.memory, recorded.spans
    index = torch.where(kept, torch.arange(kept.shape[1]), kept.shape[1])
    index = index.sort(dim=-1).values[:, :longest]
    held = index < kept.shape[1]
    index = index.clamp(max=kept.shape[1] - 1)
    keys, values = (
        side[layer].gather(1, index[..., None].expand(-1, -1, side[layer].shape[-1]))
        for side in (memory.keys, memory.values)
    )
    positions = torch.where(held, index, -1).to(torch.int32)
    span_ids, is_vision = spans.lookup(positions)
    frame_ids, patch_ids = spans.lookup_frames(positions)
    observation = Observation(
        positions=positions,
        lens=lens,
        is_vision=is_vision & held,
        span_ids=span_ids,
        seen_tokens=seen_tokens,
        protected_position=spans.trailing_frame_start(seen_tokens),
        budget_tokens=0,
        max_head_tokens=0,
        text_tokens=spans.count_text(seen_tokens),
        span_tokens=spans.span_tokens(seen_tokens),
        frame_ids=frame_ids,
        patch_ids=patch_ids,
        num_patches=spans.num_patches,
        keys=keys.masked_fill(~held[..., None], 0.0) if policy.needs_keys else None,
        contrast=contrast(keys, held) if policy.needs_contrast else None,
        layer=layer,
    )
    norms = values.norm(dim=-1).masked_fill(~held, 0.0)
    if not policy.needs_scores:
        return replace(observation, value_norms=norms if policy.needs_value_norms else None)
    mass, topk_mass = score(probe, keys, positions, policy.takes_largest, options)
    return replace(observation, mass=mass, topk_mass=topk_mass, value_norms=norms)


def score(
    probe: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    takes_largest: bool,
    options: PolicyOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mass` and `topk_mass` of the op `score`, on keys that lie in a row."""
    num_rows, _, head_size = probe.shape
    held = positions >= 0
    queries = probe.view(num_rows, keys.shape[0], -1, head_size)
    logits = torch.einsum("mhgd,hnd->hgmn", queries, keys) * head_size**-0.5
    weights = logits.masked_fill(~held[:, None, None], -torch.inf).softmax(dim=-1)
    mass = (weights.amax(dim=2) if takes_largest else weights.mean(dim=2)).mean(dim=1)
    rest = weights.masked_fill((positions < options.sink_tokens)[:, None, None], 0.0)
    rest = rest / rest.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    count = min(options.top_k_tokens(keys.shape[1]), keys.shape[1])
    return mass, rest.topk(count, dim=-1).values.sum(dim=-1).mean(dim=-1).flatten()


def contrast(keys: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The op `contrast`, on keys that lie in a row."""
    directions = torch.nn.functional.normalize(keys, dim=-1).masked_fill(~held[..., None], 0.0)
    mean = torch.nn.functional.normalize(directions.sum(dim=1), dim=-1)
    return (1.0 - torch.einsum("hnd,hd->hn", directions, mean)).masked_fill(~held, 0.0)
