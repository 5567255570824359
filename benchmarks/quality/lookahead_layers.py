"""A look-ahead that only some layers use: which of them is it for?

The other layers ask with the template alone until the question itself is reached.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.quality.inside import cache_of
from vllm_budgetkv.worker.bank import ProbeBank, Rotary

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import Self

    import torch
    from vllm.v1.core.sched.output import SchedulerOutput

    from benchmarks.quality.lab import Lab


class PartialBank(ProbeBank):
    """A bank whose question is heard by some layers only."""

    layers: Collection[int]
    template_tokens: int
    seed_size: int

    @classmethod
    def of(cls, seed: ProbeBank, layers: Collection[int], template_tokens: int) -> Self:
        """A copy of a look-ahead's bank.

        Args:
            seed: what the look-ahead left: the question, then the template.
            layers: those that ask with all of it.
            template_tokens: how much of its end the others ask with.
        """
        bank = object.__new__(cls)
        bank.__dict__.update(seed.copy().__dict__)
        bank.layers, bank.template_tokens = layers, template_tokens
        bank.seed_size = seed.num_written
        return bank

    def probe(self, layer: int, next_position: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        queries = super().probe(layer, next_position, rotary)
        has_read_more = self.num_written > self.seed_size
        if has_read_more or layer in self.layers:
            return queries
        return queries[-self.template_tokens :]


@contextmanager
def only_in(lab: Lab, layers: Collection[int], template_tokens: int) -> Iterator[None]:
    """Let only these layers of a lab use the look-aheads of the requests inside."""
    slots = cache_of(lab).slots
    follow = slots.follow

    def part_and_follow(scheduled: SchedulerOutput) -> None:
        for request_id, seed in slots.seeds.items():
            if not isinstance(seed, PartialBank):
                slots.seeds[request_id] = PartialBank.of(seed, layers, template_tokens)
        follow(scheduled)

    slots.follow = part_and_follow
    try:
        yield
    finally:
        del slots.follow
