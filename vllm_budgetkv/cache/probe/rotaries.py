"""How the queries of every layer turn with their position: found, and proven on the model.

What a module or a configuration says is a guess. A layer may rotate the end of its heads only, put
a norm or a factor that depends on the position behind the rotation, or rotate nothing. So the model
is run on a few tokens at many positions, and a guess holds for a layer if it turns the layer's own
query of one position into that of every other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.cache.probe.rotary_candidates import Candidates
from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vllm_budgetkv.cache.probe.bank import Rotary
    from vllm_budgetkv.policy import Policy

    Sample = Callable[[Sequence[int]], Mapping[str, torch.Tensor]]

SHORT = (1, 3, 4, 9, 17, 30, 61)
FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Samples:
    """Queries of one layer.

    Args:
        positions: int64 [T].
        queries: [K, T, Hq, D], of K tokens.
        noise: worst relative distance of two equal rows of one batch.
    """

    positions: torch.Tensor
    queries: torch.Tensor
    noise: float

    @classmethod
    def join(cls, batches: Sequence[Sequence[int]], queries: Sequence[torch.Tensor]) -> Samples:
        """From `queries`, [K, P, Hq, D] of each batch of P positions; its first is its last."""
        noise = max(_distance(batch[:, :1], batch[:, -1:]).max().item() for batch in queries)
        numbers = [position for batch in batches for position in batch]
        positions = upload(numbers, torch.int64, queries[0].device)
        return cls(positions, torch.cat([*queries], dim=1), noise)

    def error(self, rotary: Rotary | None) -> float:
        """The worst relative error of a turned query, from the first and the last position to all.

        NaN where nothing can be told.

        Args:
            rotary: how queries turn; None if they do not.
        """
        worst = []
        for base in (self.positions.argmin(), self.positions.argmax()):
            turned = self.queries[:, base, None].expand_as(self.queries)
            if rotary is not None:
                start = self.positions[base].expand_as(self.positions)
                turned = rotary.turn(turned, start, self.positions)
            worst.append(_distance(turned, self.queries).max())
        return torch.stack(worst).max().item()

    def tolerance(self) -> float:
        """What rounding explains.

        Each of two rotations rounds its table, products, sum and answer, the turn its answer and
        the frequencies read from the table once more: 8 units, or 4 times eps. Angles are float32
        products of a position, here and in the model. And equal rows of a matrix product may
        differ by their place in it, but by no more than that: where equal tokens get queries that
        have nothing in common, nothing is proven.
        """
        angles = 4 * self.positions.max().item() * FLOAT32_ROUNDING
        rounding = 4 * torch.finfo(self.queries.dtype).eps + angles
        return rounding + min(2 * self.noise, rounding)


def turns_probe(policy: Policy | type[Policy]) -> bool:
    """Whether the policy scores with queries that were made at other positions."""
    return policy.needs_scores and policy.probe_source.runs_ahead


def find_rotaries(
    model: torch.nn.Module,
    text_config: Any,
    sample: Sample,
    max_model_tokens: int,
    max_sample_positions: int,
    layer_index: Mapping[str, int],
) -> dict[int, Rotary]:
    """How queries turn in each layer that turns them.

    Args:
        model: the model.
        text_config: Hugging Face configuration of the language model.
        sample: queries of every layer at given positions, `[K, T, Hq, D]`; see `sample_queries`.
        max_model_tokens: length of a request.
        max_sample_positions: positions for one call of `sample`, 4 or more.
        layer_index: index of every attention layer by name.

    Returns:
        By layer, one object for layers that turn alike; layers whose queries need no turn are left
        out.

    Raises:
        ValueError: how a layer's queries turn is not known.
    """
    candidates = Candidates(model, text_config)
    owners = candidates.owners(layer_index)
    room = candidates.max_positions(owners)
    limit = min(max_model_tokens, room or max_model_tokens)
    samples = _take(sample, limit, max_sample_positions)
    found: dict[int, Rotary] = {}
    known: list[Rotary] = []
    unknown: dict[int, tuple[float, float]] = {}
    for name, layer in sorted(layer_index.items(), key=lambda item: item[1]):
        of_layer = samples[name]
        guesses = candidates.of_layer(owners[layer], of_layer.queries)
        tolerance = of_layer.tolerance()
        rotary, error = _best(of_layer, tolerance, itertools.chain((None, *known), guesses))
        if not error <= tolerance:
            unknown[layer] = (error, tolerance)
        elif rotary is not None:
            found[layer] = rotary
            if rotary.gain is None and rotary not in known:
                known.append(rotary)
    if not unknown or (not found and candidates.has_learned_positions(limit - 1)):
        return found
    raise ValueError(_refusal(unknown, owners, len(layer_index)))


def _best(
    samples: Samples, tolerance: float, rotaries: Iterable[Rotary | None]
) -> tuple[Rotary | None, float]:
    """The first rotation that holds, or else the nearest, and its error."""
    best, least = None, torch.inf
    for rotary in rotaries:
        error = samples.error(rotary)
        if error < least:
            best, least = rotary, error
        if error <= tolerance:
            break
    return best, least


def _take(sample: Sample, limit: int, count: int) -> dict[str, Samples]:
    """Queries from a long and then from a short request.

    Both, because some rotations follow the longest position of a batch; and the short one last,
    because they go back to what they were with it.
    """
    top = limit - 1
    long = (1, top, top // 3, top // 11, top * 2 // 3, top // 101, top // 37)
    batches = []
    for wanted in (long, SHORT):
        chosen = [min(position, top) for position in wanted[: count - 1]]
        batches.append([*chosen, chosen[0]])
    taken = [sample(batch) for batch in batches]
    return {name: Samples.join(batches, [queries[name] for queries in taken]) for name in taken[0]}


def _distance(query: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative distance [K, T] of queries [K, T, Hq, D], over all heads of a token."""
    query, expected = query.float().flatten(2), expected.float().flatten(2)
    return (query - expected).norm(dim=-1) / expected.norm(dim=-1)


def _refusal(
    unknown: Mapping[int, tuple[float, float]],
    owners: Mapping[int, torch.nn.Module],
    num_layers: int,
) -> str:
    layer, (error, tolerance) = max(unknown.items(), key=lambda item: item[1][0])
    without = [name for name, policy in POLICIES.items() if not turns_probe(policy)]
    return (
        f"the queries of {len(unknown)} of {num_layers} layers ({type(owners[layer]).__name__}) "
        "change with their position in a way that is not known, so a question that runs ahead "
        f"cannot be asked where it is needed: the nearest rotation is off by {error:.1%} "
        f"(tolerance {tolerance:.1%}); use a policy that turns no query (--kv-policy "
        f"{', '.join(without)}), or a shorter --max-model-len if the model changes its rotation "
        "with the length"
    )
