"""Items whose pixels no worker was sent, and which one needs after all.

vLLM sends workers no pixels of an item that cached tokens cover when its request is admitted. One
that is preempted and finds less when it comes back computes such items again; model runner V1 then
has what it was sent first, and its encoder nothing to compute. So the scheduler sends along what is
missing, in the step that computes it, and to no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request


@dataclass
class StepWithItems(SchedulerOutput):
    """A step, and what workers lack of the items that it computes.

    Args:
        items: by request, and by index among its items.
    """

    items: dict[str, dict[int, MultiModalFeatureSpec]] = field(default_factory=dict)

    def give_to(self, requests: Mapping[str, Any]) -> None:
        """Put them into requests of model runner V1, by id. Mutates these."""
        for request_id, features in self.items.items():
            for index, feature in features.items():
                requests[request_id].mm_features[index] = feature


@dataclass
class StrippedItems:
    """Which items of each request workers have without their pixels."""

    _items: dict[str, set[int]] = field(default_factory=dict, init=False)

    def follow(
        self, scheduled: SchedulerOutput, requests: Mapping[str, Request]
    ) -> SchedulerOutput:
        """Note what a step leaves out; returns it with what it needs of that."""
        for new in scheduled.scheduled_new_reqs:
            whole = requests[new.req_id].mm_features
            pairs = enumerate(zip(new.mm_features, whole, strict=True))
            found = {index for index, (sent, full) in pairs if sent is not full}
            self.forget(new.req_id)
            if found:
                self._items[new.req_id] = found
        due: dict[str, dict[int, MultiModalFeatureSpec]] = {}
        for request_id, indices in scheduled.scheduled_encoder_inputs.items():
            missing = self._items.get(request_id, set()).intersection(indices)
            if missing:
                features = requests[request_id].mm_features
                due[request_id] = {index: features[index] for index in missing}
                self._items[request_id] -= missing
        if not due:
            return scheduled
        values = {known.name: getattr(scheduled, known.name) for known in fields(SchedulerOutput)}
        return StepWithItems(**values, items=due)

    def forget(self, request_id: str) -> None:
        """Drop what is noted of a request that ended, or that is sent anew."""
        self._items.pop(request_id, None)


def brought_by(scheduled: SchedulerOutput) -> StepWithItems | None:
    """The step, if it brings items."""
    return scheduled if isinstance(scheduled, StepWithItems) else None
