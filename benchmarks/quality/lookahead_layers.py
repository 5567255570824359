"""A look-ahead that only some layers use: which of them is it for?

The other layers ask with the chat template alone, until the question itself is reached. Its queries
come from a look-ahead that has seen nothing else: behind a question, the template's tokens know it
in all layers but the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benchmarks.quality.inside import before_admission, closing
from benchmarks.quality.lab import Lab
from vllm_budgetkv.cache.probe.bank import ProbeBank, Rotary

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Self

    from vllm.v1.core.sched.output import SchedulerOutput

    from benchmarks.quality.lab import Outcome, Setup
    from benchmarks.quality.suite import Example
    from vllm_budgetkv.cache.probe.probes import Probes


class PartialBank(ProbeBank):
    """A bank whose question is heard by some layers only."""

    layers: Collection[int]
    template: ProbeBank
    seed_size: int

    @classmethod
    def of(cls, seed: ProbeBank, layers: Collection[int], template: ProbeBank) -> Self:
        """A copy of a look-ahead's bank.

        Args:
            seed: what the look-ahead left.
            layers: those that ask with it.
            template: what the others ask with.
        """
        bank = object.__new__(cls)
        bank.__dict__.update(seed.copy().__dict__)
        bank.layers, bank.template, bank.seed_size = layers, template, seed.num_written
        return bank

    def probe(
        self, layers: int | slice, next_position: torch.Tensor, rotary: Rotary | None
    ) -> torch.Tensor:
        if isinstance(layers, slice):
            each = range(layers.start, layers.stop)
            return torch.stack([self.probe(layer, next_position, rotary) for layer in each])
        has_read_more = self.num_written > self.seed_size
        asked = self if has_read_more or layers in self.layers else self.template
        return ProbeBank.probe(asked, layers, next_position, rotary)


def ask_with_layers(
    setup: Setup, groups: Sequence[Sequence[Example]], layers: Collection[int]
) -> list[Outcome]:
    """Answers of an engine whose look-ahead only some layers use.

    Args:
        setup: of the engine.
        groups: what to ask, one group after the other.
        layers: those that use it.
    """
    template = template_bank(setup, groups[0][0])
    lab = Lab(setup)
    with closing(lab), before_admission(lab, parting(layers, template)):
        return [outcome for group in groups for outcome in lab.ask(group)]


def template_bank(setup: Setup, example: Example) -> ProbeBank:
    """What a look-ahead of the template alone leaves; the same for every prompt.

    Raises:
        ValueError: nothing ran ahead.
    """
    banks: list[ProbeBank] = []
    lab = Lab(replace(setup, budget=setup.budget | {"lookahead_source": "template"}))
    with closing(lab), before_admission(lab, lambda probes, _: banks.extend(probes.seeds.values())):
        lab.ask([example])
    if not banks:
        raise ValueError(
            f"nothing ran ahead of a prompt of about {example.length_tokens} tokens: choose a "
            "policy that looks ahead and a quota that the prompt exceeds"
        )
    return banks[0]


def parting(
    layers: Collection[int], template: ProbeBank
) -> Callable[[Probes, SchedulerOutput], None]:
    """What replaces every seed by one that only some layers use; for `before_admission`."""

    def part(probes: Probes, _: SchedulerOutput) -> None:
        for request_id, seed in probes.seeds.items():
            if not isinstance(seed, PartialBank):
                probes.seed(request_id, PartialBank.of(seed, layers, template))

    return part
