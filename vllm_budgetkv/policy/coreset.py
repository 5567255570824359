"""A coreset of points in rounds: farthest first, and what adds new directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# each takes an equal part of the coreset; with one point in a round it is the greedy choice itself
ROUNDS = 8
# judged beside twice as many as a round takes: a still scene holds many copies of its best point
SPARE_RIVALS = 128
# beyond any distance between points of unit scale, and finite: it is multiplied by 0
FAR = 1e6


@dataclass
class Coreset:
    """What is chosen so far. H heads, n points of D dimensions.

    Attributes:
        points: float32 [H, n, D], with a mean squared norm of 1.
        is_open: bool [H, n], points that may still be chosen.
        diversity_share: how much new directions count against coverage, 0 to 1.
        nearest: float32 [H, n], squared distance to the nearest chosen point.
        residual: float32 [H, n], z^T inverse z.
        inverse: float32 [H, D, D], of I + the sum over the chosen points of z z^T.
    """

    points: torch.Tensor
    is_open: torch.Tensor
    diversity_share: float
    nearest: torch.Tensor
    residual: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def empty(cls, points: torch.Tensor, is_open: torch.Tensor, diversity_share: float) -> Coreset:
        """Nothing is chosen yet."""
        nearest = torch.full_like(points[..., 0], FAR)
        inverse = torch.eye(points.shape[-1], device=points.device).repeat(points.shape[0], 1, 1)
        residual = points.square().sum(dim=-1)
        return cls(points, is_open, diversity_share, nearest, residual, inverse)

    def add(self, index: torch.Tensor, is_valid: torch.Tensor) -> None:
        """Choose points: `index` int64 [H, k], of which those count that `is_valid` names."""
        chosen = take(self.points, index) * is_valid[..., None]
        apart = squared_distances(self.points, chosen).masked_fill(~is_valid[:, None], FAR)
        self.nearest = torch.minimum(self.nearest, apart.amin(dim=-1))
        # Woodbury: nothing of D^2 is computed for each point
        reach = chosen @ self.inverse
        taken = torch.linalg.solve_triangular(factor(reach @ chosen.mT), reach, upper=False)
        self.inverse = self.inverse - taken.mT @ taken
        lost = (self.points @ taken.mT).square().sum(dim=-1)
        self.residual = (self.residual - lost).clamp(min=0)
        still = self.is_open.gather(-1, index) & ~is_valid
        self.is_open = self.is_open.scatter(-1, index, still)

    def best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` open points that add most: index int64 [H, count], and whether it is one.

        More than twice as many are taken by what each adds alone. Then each is judged again as if
        all that are better were chosen, so that copies of one point do not come together.
        """
        gains = self._gain(self.nearest, self.residual).masked_fill(~self.is_open, -torch.inf)
        alone, rivals = gains.topk(min(2 * count + SPARE_RIVALS, gains.shape[-1]), dim=-1)
        again = self._gain_behind_better(rivals).masked_fill(alone == -torch.inf, -torch.inf)
        judged, place = again.topk(count, dim=-1)
        return rivals.gather(-1, place), judged > -torch.inf

    def _gain_behind_better(self, rivals: torch.Tensor) -> torch.Tensor:
        """What each of the rivals, the best first, adds behind all before it; float32 [H, k]."""
        points = take(self.points, rivals)
        is_better = torch.ones_like(rivals[0, :, None] * rivals[0]).tril(-1).bool()
        apart = squared_distances(points, points).masked_fill(~is_better, FAR).amin(dim=-1)
        nearest = torch.minimum(self.nearest.gather(-1, rivals), apart)
        pivots = factor(points @ self.inverse @ points.mT).diagonal(dim1=-2, dim2=-1)
        return self._gain(nearest, pivots.square() - 1)

    def _gain(self, nearest: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Points of unit scale are 2 apart, squared, so both parts start at about 1."""
        return (1 - self.diversity_share) / 2 * nearest + self.diversity_share * residual


def rank(
    points: torch.Tensor,
    is_held: torch.Tensor,
    is_seed: torch.Tensor,
    max_seeds: int,
    count: int,
    diversity_share: float,
) -> torch.Tensor:
    """Rank points in the order in which they enter a coreset.

    In each round every point z is scored by what it adds to those chosen before:

    - coverage: squared distance to the nearest chosen point (farthest first, Gonzalez 1985, which
      is within twice the best radius of k centres);
    - diversity: z^T (I + sum z z^T)^-1 z, what the span of the chosen leaves of it, softened
      because a coreset has more points than dimensions. log det (I + sum z z^T) grows by
      log (1 + it).

    The greedy choice has `count` steps, one behind the other; this has `ROUNDS`, and is the same
    where a round takes one point. Both cost n * `count` * D for each head; here come k^2 * (D + k)
    in each round for k = 2 * `count` / `ROUNDS` + `SPARE_RIVALS` rivals. The largest tensors
    have n * D and n * k elements.

    Args:
        points: float32 [H, n, D], of unit scale.
        is_held: bool [H, n]; the others are never chosen.
        is_seed: bool [H, n], held points that are chosen before all others.
        max_seeds: no head has more of them; at least 1.
        count: how many are ranked beside the seeds.
        diversity_share: 0 to 1.

    Returns:
        float32 [H, n]: the seeds highest, then those that entered in their order, 0 for all others.
        Nothing is mutated.
    """
    num_points = points.shape[1]
    per_round = -(-min(count, num_points) // ROUNDS)
    coreset = Coreset.empty(points, is_held, diversity_share)
    seeded, index = is_seed.float().topk(min(max_seeds, num_points), dim=-1)
    coreset.add(index, seeded > 0)
    scores = is_seed.float() * (ROUNDS * per_round + 1)
    for number in range(ROUNDS):
        index, is_valid = coreset.best(per_round)
        coreset.add(index, is_valid)
        order = torch.arange(per_round, device=points.device) + number * per_round
        entered = (ROUNDS * per_round - order) * is_valid
        scores = scores.scatter_add(-1, index, entered.float())
    return scores


def unit_scale(vectors: torch.Tensor, is_held: torch.Tensor) -> torch.Tensor:
    """Vectors of each head around their mean, with a mean squared norm of 1.

    Args:
        vectors: [H, n, D].
        is_held: bool [H, n].

    Returns:
        float32 [H, n, D], 0 where nothing is held.
    """
    held = is_held[..., None].float()
    counts = held.sum(dim=1, keepdim=True).clamp(min=1)
    vectors = vectors.float() * held
    vectors = (vectors - vectors.sum(dim=1, keepdim=True) / counts) * held
    scale = (vectors.square().sum(dim=(1, 2), keepdim=True) / counts).sqrt()
    return vectors / scale.clamp(min=torch.finfo(torch.float32).tiny)


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [H, n, D] by `index` int64 [H, k]: [H, k, D]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def squared_distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """float32 [H, n, k] of points [H, n, D] and [H, k, D]."""
    norms, of_others = (x.square().sum(dim=-1) for x in (points, others))
    apart = norms[..., None] + of_others[:, None] - 2 * points @ others.mT
    return apart.clamp(min=0)


def factor(gram: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of I + `gram` [H, k, k], without asking the device whether it went:
    the sum of I and a Gram matrix has no eigenvalue below 1."""
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.cholesky_ex(gram + eye, check_errors=False).L
