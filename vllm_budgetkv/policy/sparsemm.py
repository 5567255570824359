"""`sparsemm`: the scores of SnapKV, and head budgets from scores that were measured offline."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_budgetkv.policy.budgets import RATIO_UNIT, slack
from vllm_budgetkv.policy.snapkv import SnapKVPolicy

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation, Retention
    from vllm_budgetkv.policy.options import PolicyOptions

MAX_SHARE = 2.0
"""Most that a head may get, in mean budgets: what the quota's page tables are made for."""
MAX_SCORE = 1e100
"""Scores stay below it, so that their sum is a number."""


class SparseMMPolicy(SnapKVPolicy):
    """SparseMM (https://arxiv.org/abs/2506.05344): few heads look at the picture, they get more.

    A head gets r C + s (1 - r) C L H tokens, with C the mean budget, r `uniform_share` and s its
    share of the scores of all layers and heads. A head's surplus above twice the mean goes to the
    others. Layers take their shares one compression after another, see `Policy.layer_budgets`.

    Raises:
        ValueError: there is no file of scores, or it holds no such list.
    """

    name: ClassVar[str] = "sparsemm"

    @classmethod
    def check(cls, options: PolicyOptions, lookahead: bool = True) -> None:
        """See `Policy.check`."""
        super().check(options, lookahead)
        if options.head_scores_file is None:
            raise ValueError(
                "--kv-policy sparsemm needs --kv-head-scores-file: set it to a JSON file with a "
                "list per layer, a number per KV head, measured offline"
            )

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        super().__init__(options, page_tokens)
        assert options.head_scores_file is not None
        scores = read_head_scores(Path(options.head_scores_file))
        self._shares = head_shares(scores, options.uniform_share)

    def layer_budgets(self, num_layers: int, num_heads: int, budget_tokens: int) -> tuple[int, ...]:
        """See `Policy.layer_budgets`."""
        shape = (len(self._shares), len(self._shares[0]))
        if shape != (num_layers, num_heads):
            raise ValueError(
                f"--kv-head-scores-file {self._options.head_scores_file} has {shape[0]} layers of "
                f"{shape[1]} KV heads, but this worker has {num_layers} of {num_heads}: measure "
                "this model, without tensor parallelism"
            )
        means = [sum(row) / num_heads for row in self._shares]
        return tuple(max(1, math.floor(mean * (budget_tokens - 1))) for mean in means)

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        kept = super().retain(observation)
        if observation.fits:
            return kept
        total_tokens = observation.budget_tokens * observation.shape[0]
        weights = [max(1, round(share * RATIO_UNIT)) for share in self._shares[observation.layer]]
        caps = observation.lens.long().clamp(max=observation.max_head_tokens)
        budgets = torch.stack(
            [
                cap.clamp(max=total_tokens * weight // sum(weights))
                for cap, weight in zip(caps.unbind(), weights, strict=True)
            ]
        )
        budgets = budgets + slack(budgets, caps, total_tokens)
        return replace(kept, budgets=budgets.int())


def read_head_scores(path: Path) -> list[list[float]]:
    """Scores of all KV heads, a list per layer.

    Raises:
        ValueError: the file cannot be read or holds anything but equally long lists of numbers, 0
            or more and not all 0.
    """
    try:
        scores: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"--kv-head-scores-file {path} cannot be read as JSON ({error}): name a file with a "
            "list per layer, each with a number per KV head"
        ) from error
    rows = scores if isinstance(scores, list) else []
    valid = bool(rows) and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    flat = [score for row in rows for score in row] if valid else []
    numbers = [s for s in flat if type(s) in (int, float) and 0 <= s < MAX_SCORE]
    if not flat or len(numbers) != len(flat) or sum(numbers) <= 0:
        raise ValueError(
            f"--kv-head-scores-file {path} must hold a JSON list with a list per layer, each with "
            f"a number per KV head, 0 or more, below {MAX_SCORE:g} and not all 0"
        )
    return rows


def head_shares(scores: list[list[float]], uniform_share: float) -> list[list[float]]:
    """Budget of each head in mean budgets: r + s (1 - r) L H, at most `MAX_SHARE`; their mean is 1.

    Args:
        scores: [L][H], 0 or more, not all 0.
        uniform_share: r, 0 to 1.
    """
    num_heads, total = sum(map(len, scores)), sum(map(sum, scores))
    scale = (1 - uniform_share) * num_heads / total
    wanted = [[uniform_share + score * scale for score in row] for row in scores]
    shares = [[min(share, MAX_SHARE) for share in row] for row in wanted]
    # what is above the cap fills the rest in proportion to its room, which is always enough
    surplus = max(0.0, num_heads - sum(map(sum, shares)))
    room = sum(MAX_SHARE - share for row in shares for share in row)
    return [[share + surplus * (MAX_SHARE - share) / room for share in row] for row in shares]
