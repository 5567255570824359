"""The formulas once more, in plain Python loops, one token at a time."""

from __future__ import annotations

from fractions import Fraction

from vllm_budgetkv.policy import Observation, PolicyOptions, Tier


def pool(observation: Observation, width_tokens: int) -> list[list[float]]:
    """Largest mass among the neighbours in the prompt that no gap and no span border cuts off."""
    assert observation.mass is not None
    pooled = []
    for head, length in enumerate(observation.lens.tolist()):
        mass = observation.mass[head].tolist()
        positions = observation.positions[head].tolist()
        spans = observation.span_ids[head].tolist()
        row = [0.0] * len(mass)
        for i in range(length):
            best = mass[i]
            for step in (-1, 1):
                j = i
                for _ in range(width_tokens // 2):
                    j += step
                    if not 0 <= j < length or spans[j] != spans[i]:
                        break
                    if positions[j] != positions[i] + (j - i):
                        break
                    best = max(best, mass[j])
            row[i] = best
        pooled.append(row)
    return pooled


def allocate(
    observation: Observation,
    scores: list[list[float]],
    tiers: list[list[int]],
    is_static: list[bool],
    options: PolicyOptions,
    page_tokens: int,
) -> list[int]:
    """Budgets, with Ada-KV's pool sorted token by token. Ratios must be multiples of 1/1024."""
    num_heads = len(scores)
    total = observation.budget_tokens * num_heads
    caps = [min(length, observation.max_head_tokens) for length in observation.lens.tolist()]
    heads = range(num_heads)
    weights = [
        Fraction(options.static_weight if static else options.dynamic_weight)
        for static in is_static
    ]
    share = int(total * Fraction(options.dynamic_weight) / sum(weights))
    share = min(share, observation.max_head_tokens)
    if share >= page_tokens:
        share -= share % page_tokens
    budgets = [0 if is_static[h] else min(share, caps[h]) for h in heads]
    if any(is_static):
        _share_pool(budgets, scores, tiers, is_static, total - sum(budgets), options)
        budgets = [min(budgets[h], caps[h]) for h in heads]
    for receives in (is_static, [True] * num_heads):
        rooms = [max(caps[h] - budgets[h], 0) if receives[h] else 0 for h in heads]
        spare = min(total - sum(budgets), sum(rooms))
        for h in heads:
            grown = budgets[h] + (rooms[h] * spare // sum(rooms) if sum(rooms) else 0)
            if not is_static[h] and grown < caps[h]:
                grown = max(grown - grown % page_tokens, budgets[h])
            budgets[h] = grown
    return budgets


def _share_pool(
    budgets: list[int],
    scores: list[list[float]],
    tiers: list[list[int]],
    is_static: list[bool],
    pool_tokens: int,
    options: PolicyOptions,
) -> None:
    ranked = []
    for h, row in enumerate(scores):
        free = [i for i, tier in enumerate(tiers[h]) if tier == Tier.SCORED]
        norm = sum(row[i] for i in free) or 1.0
        if is_static[h]:
            ranked += [(row[i] / norm, h) for i in free]
            ranked += [(2.0, h) for tier in tiers[h] if tier > Tier.SCORED]
    best = sorted(ranked, reverse=True)[:pool_tokens]
    uniform = pool_tokens // sum(is_static)
    floor = Fraction(round(options.floor_ratio * 1024), 1024)
    for h, static in enumerate(is_static):
        if static:
            count = sum(head == h for _, head in best)
            budgets[h] = int(count * (1 - floor) + uniform * floor)


def prior_text(
    scores: list[float], spans: list[int], candidates: list[bool], size: dict[int, int], cap: int
) -> set[int]:
    """Seats by Sainte-Lague: the span with the lowest turn sends its next best token."""
    waiting: dict[int, list[int]] = {}
    for i, candidate in enumerate(candidates):
        if candidate:
            waiting.setdefault(spans[i], []).append(i)
    for tokens in waiting.values():
        tokens.sort(key=lambda i: scores[i])
    taken = dict.fromkeys(waiting, 0)
    chosen: set[int] = set()
    while len(chosen) < cap and any(waiting.values()):
        span = min(
            (span for span in waiting if waiting[span]),
            key=lambda s: (Fraction(2 * taken[s] + 1, size[s]), -scores[waiting[s][-1]]),
        )
        chosen.add(waiting[span].pop())
        taken[span] += 1
    return chosen


def keep_units(
    scores: list[float], tiers: list[int], positions: list[int], unit_tokens: int, budget: int
) -> list[int]:
    """Indices of the best whole units that fit the budget before the first that does not."""
    units: dict[int, list[int]] = {}
    for i, position in enumerate(positions):
        if position >= 0:
            units.setdefault(position // unit_tokens, []).append(i)
    ranked = sorted(
        units.items(),
        key=lambda item: (max(tiers[i] for i in item[1]), max(scores[i] for i in item[1]), item[0]),
        reverse=True,
    )
    kept: list[int] = []
    for _, tokens in ranked:
        if len(kept) + len(tokens) > budget:
            break
        kept += tokens
    return sorted(kept)
