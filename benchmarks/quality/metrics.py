"""Quality without answers: how much of the full cache's attention survives a compression.

    python -m benchmarks.quality.metrics --policies hybrid,window,snapkv --quota 0.1 --count 10

The prompts run once on the full cache, which gives every key, value and the queries of the last
prompt tokens, and once under each policy, which gives the positions that every head kept behind the
prefill. Everything is computed from these with exact attention in float64. What a compression does
to later keys and values, and what merging does to kept ones, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality import reader
from benchmarks.quality.inside import (
    KeptRecorder,
    PrefillRecorder,
    cache_of,
    closing,
    prepare_environment,
)
from benchmarks.quality.lab import Lab, Setup
from benchmarks.quality.provenance import settings_of
from benchmarks.quality.suite import TASKS, make_examples
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.quality.inside import Prefill
    from benchmarks.quality.suite import Example

QUERY_TOKENS = 8
ANSWER_ROOM_TOKENS = 64


@dataclass(frozen=True)
class HeadQuality:
    """One KV head of one layer behind the prefill of one prompt.

    Attributes:
        kept_tokens: prompt tokens that it still holds.
        retained_mass: share of the full attention that falls on them, 0 to 1.
        output_error: |o - o_kept| / |o|, o_kept being attention over the kept tokens alone.
        pages_touched: share of the best pages of which one of the best tokens is kept.
        pages_whole: share of the best pages of which all of the best tokens are kept.
        similarity_before: mean cosine of two keys of the prompt; similarity_after: of two kept.
    """

    layer: int
    head: int
    kept_tokens: int
    retained_mass: float
    output_error: float
    pages_touched: float
    pages_whole: float
    similarity_before: float
    similarity_after: float


MEASURES = tuple(f.name for f in fields(HeadQuality) if f.name not in ("layer", "head"))


def attention(
    queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of some queries to all keys.

    Args:
        queries: [m, Hq, D]; query heads of one KV head are neighbours.
        positions: int64 [m]; a query sees the keys up to its own.
        keys: [H, n, D].
        scale: of the logits.

    Returns:
        float64 [H, Hq / H, m, n], rows sum to 1.
    """
    num_queries, _, head_size = queries.shape
    num_heads, num_keys, _ = keys.shape
    grouped = queries.double().view(num_queries, num_heads, -1, head_size)
    logits = torch.einsum("mhgd,hnd->hgmn", grouped, keys.double()) * scale
    hidden = torch.arange(num_keys) > positions[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def retained_mass(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Attention on kept tokens, mean over queries and query heads.

    Args:
        weights: [H, G, m, n], rows sum to 1.
        kept: bool [H, n].

    Returns:
        [H].
    """
    return (weights * kept[:, None, None]).sum(dim=-1).mean(dim=(1, 2))


def output_error(weights: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of attention that sees the kept tokens alone, mean as `retained_mass`.

    Args:
        weights: [H, G, m, n], rows sum to 1.
        values: [H, n, D].
        kept: bool [H, n]. A query without a kept token gives zeros, an error of 1.

    Returns:
        [H].
    """
    values = values.to(weights.dtype)[:, None]
    rest = weights * kept[:, None, None]
    rest = rest / rest.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
    full, lossy = weights @ values, rest @ values
    error = torch.linalg.vector_norm(full - lossy, dim=-1)
    return (error / torch.linalg.vector_norm(full, dim=-1)).mean(dim=(1, 2))


def page_recall(
    weights: torch.Tensor, kept: torch.Tensor, page_tokens: int, num_pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the pages that exact attention would fetch are kept, in part and as a whole.

    The prompt is cut into pages of `page_tokens`, as the full cache would hold it. The best tokens
    are those with the most attention, as many as fill `num_pages`; the best pages are those whose
    best tokens have the most. So each of the best pages holds one of the best tokens or more.

    Args:
        weights: [H, G, m, n]; averaged over queries and query heads.
        kept: bool [H, n].
        page_tokens: tokens of a page.
        num_pages: how many pages are the best.

    Returns:
        [H] and [H]: share of the best pages of which one best token, and all of them, are kept.
    """
    mass = weights.mean(dim=(1, 2))
    num_tokens = mass.shape[1]
    count = ceil_div(num_tokens, page_tokens)
    best = mass.topk(min(num_pages * page_tokens, num_tokens), dim=-1).indices
    is_best = torch.zeros_like(kept).scatter_(1, best, True)

    def by_page(x: torch.Tensor) -> torch.Tensor:
        padding = (0, count * page_tokens - num_tokens)
        padded = torch.nn.functional.pad(x.to(mass.dtype), padding)
        return padded.view(len(x), count, page_tokens).sum(dim=-1)

    # a weight that underflows must not lose against a page without a best token
    floor = torch.finfo(mass.dtype).tiny
    pages = by_page(mass.clamp(min=floor) * is_best).topk(min(num_pages, count), dim=-1).indices
    wanted = by_page(is_best).gather(1, pages)
    found = by_page(is_best & kept).gather(1, pages)
    touched = (found > 0).to(mass.dtype).mean(dim=1)
    whole = (found == wanted).to(mass.dtype).mean(dim=1)
    return touched, whole


def mean_cosine(keys: torch.Tensor) -> float:
    """Mean cosine of two different keys: (|sum of unit keys|^2 - n) / (n (n - 1)), as in MixKV.

    Args:
        keys: [n, D]. Fewer than two have no pair: NaN.
    """
    if len(keys) < 2:
        return float("nan")
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    total = float(unit.sum(dim=0).square().sum())
    return (total - len(keys)) / (len(keys) * (len(keys) - 1))


def measure(
    prefill: Prefill, kept: torch.Tensor, scales: Sequence[float], page_tokens: int, num_pages: int
) -> list[HeadQuality]:
    """Every head of one prompt.

    Args:
        prefill: of the full cache, with keys and values.
        kept: bool [L, H, n], what a policy kept.
        scales: softmax scale of each layer.
        page_tokens: tokens of a page.
        num_pages: pages of the quota.

    Raises:
        ValueError: `kept` is of another prompt.
    """
    assert prefill.keys is not None and prefill.values is not None
    if kept.shape != prefill.keys.shape[:3]:
        raise ValueError(
            f"kept {list(kept.shape)} must be [L, H, n] = {list(prefill.keys.shape[:3])} as in the "
            "full run: ask both engines the same prompts"
        )
    positions = torch.tensor(prefill.positions)
    found = []
    for layer, scale in enumerate(scales):
        keys, values, held = prefill.keys[layer], prefill.values[layer], kept[layer]
        weights = attention(prefill.queries[layer], positions, keys, scale)
        mass, error = retained_mass(weights, held), output_error(weights, values, held)
        touched, whole = page_recall(weights, held, page_tokens, num_pages)
        found += [
            HeadQuality(
                layer=layer,
                head=head,
                kept_tokens=int(held[head].sum()),
                retained_mass=float(mass[head]),
                output_error=float(error[head]),
                pages_touched=float(touched[head]),
                pages_whole=float(whole[head]),
                similarity_before=mean_cosine(keys[head]),
                similarity_after=mean_cosine(keys[head, held[head]]),
            )
            for head in range(len(keys))
        ]
    return found


def means(found: Sequence[HeadQuality]) -> dict[str, float]:
    """Mean of every measure over heads and prompts."""
    return {name: statistics.fmean(getattr(q, name) for q in found) for name in MEASURES}


def means_by_head(found: Sequence[HeadQuality]) -> list[dict[str, float]]:
    """Mean of every measure over prompts, one entry per (layer, head)."""
    places = sorted({(q.layer, q.head) for q in found})
    return [
        asdict(HeadQuality(*place, **means([q for q in found if (q.layer, q.head) == place])))
        for place in places
    ]


def full_prefills(setup: Setup, examples: Sequence[Example]) -> tuple[list[Prefill], list[float]]:
    """Keys, values and last queries of all prompts on the full cache; the scale of each layer.

    All are held in memory: 2 * L * H * n * D numbers per prompt.
    """
    lab = Lab(setup)
    with (
        closing(lab),
        PrefillRecorder(
            lab,
            lambda spans: list(range(spans.prompt_tokens - QUERY_TOKENS, spans.prompt_tokens)),
            takes_cache=True,
        ) as recorder,
    ):
        lab.ask(examples)
        scales = cache_of(lab).layers.reader.scales
    return recorder.prefills(), [scales[layer] for layer in sorted(scales)]


def kept_of(setup: Setup, examples: Sequence[Example]) -> tuple[list[torch.Tensor], list[bool]]:
    """What every head kept of each prompt, and whether the answer was right."""
    lab = Lab(setup)
    with closing(lab), KeptRecorder(lab) as recorder:
        outcomes = lab.ask(examples)
    return recorder.kept(), [outcome.right for outcome in outcomes]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All policies on all tasks; the settings, and an entry per policy and task."""
    examples = [
        example
        for task in options.tasks
        for example in make_examples(task, options.length, options.count)
    ]
    full = Setup(
        model=str(options.model),
        budget={"policy": "full"},
        max_model_len=options.length + ANSWER_ROOM_TOKENS,
        engine={"max_num_batched_tokens": 1024, "max_num_seqs": 8},
    )
    pages = ceil_div(round(options.quota * options.length), full.page_tokens)
    prefills, scales = full_prefills(full, examples)
    results = []
    for policy in options.policies:
        budget = {
            "policy": policy,
            "page_quota": pages,
            "chunk_tokens": options.chunk_tokens,
            "decode_interval_tokens": 2 * full.page_tokens,
        }
        kept, right = kept_of(replace(full, budget=budget), examples)
        for task in options.tasks:
            chosen = [i for i, example in enumerate(examples) if example.task == task]
            found = [
                quality
                for i in chosen
                for quality in measure(prefills[i], kept[i], scales, full.page_tokens, pages)
            ]
            result = {
                "policy": policy,
                "task": task,
                "accuracy": statistics.fmean(map(right.__getitem__, chosen)),
            }
            results.append(result | means(found) | {"heads": means_by_head(found)})
    settings = settings_of(options)
    return {"settings": settings | {"page_quota": pages}, "results": results}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row per policy and task."""
    columns = ("policy", "task", "accuracy", *MEASURES)
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for result in results:
        cells = [result[name] for name in columns]
        texts = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    return text.split(",")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Attention that survives each policy.")
    parser.add_argument("--model", type=Path, default=reader.FOLDER, help="folder of the model")
    parser.add_argument("--policies", type=names, default=["hybrid", "window", "snapkv"])
    parser.add_argument(
        "--tasks", type=names, default=["needle", "detail", "count"], help=",".join(TASKS)
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt, about")
    parser.add_argument("--count", type=int, default=10, help="prompts of each task")
    parser.add_argument("--quota", type=float, default=0.1, help="share of --length, 0 to 1")
    parser.add_argument("--chunk-tokens", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality_metrics.json"))
    options = parser.parse_args()
    for given, known in ((options.policies, POLICIES), (options.tasks, TASKS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return options


def main() -> None:
    options = parse_arguments()
    prepare_environment()
    answer = run(options)
    options.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    print(table(answer["results"]))


if __name__ == "__main__":
    main()
