"""Listens to the start's own proof of how queries turn, and measures how exact it is.

A start under a policy that asks ahead ends where no rotation is proven; that is the proof. Beside
it, the queries of short positions are taken once more, from the model, and compared with turned
ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_budgetkv.cache.probe import rotaries

if TYPE_CHECKING:
    from collections.abc import Mapping


class Proof:
    """What the start of the last engine found."""

    def __init__(self) -> None:
        self.num_layers = 0
        self.num_turned = 0
        self.error = 0.0

    def install(self) -> None:
        """Be told by every start of this process."""
        from vllm_budgetkv.worker import worker

        found_by = worker.find_rotaries

        def find(model: Any, text_config: Any, sample: Any, **rest: Any) -> Any:
            found = found_by(model, text_config, sample, **rest)
            self.measure(found, sample, rest["layer_index"])
            return found

        worker.find_rotaries = find

    def measure(self, found: Mapping[int, Any], sample: Any, layers: Mapping[str, int]) -> None:
        """The worst error of a query that is turned from one short position to another."""
        batch = [*rotaries.SHORT, rotaries.SHORT[0]]
        queries = sample(batch)
        self.num_layers, self.num_turned = len(layers), len(found)
        self.error = max(
            rotaries.Samples.join([batch], [queries[name]]).error(found.get(layer))
            for name, layer in layers.items()
        )

    def told(self) -> dict[str, Any]:
        """As it is written down."""
        return {"layers": self.num_layers, "turned": self.num_turned, "error": self.error}
