"""A decode step is ready for CUDA graphs: nothing allocated, nothing read back, and replayable."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backend import AttentionCGSupport

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_recall import RecallLab
from tests.worker.test_fields import batch, bound
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.policy import PolicyOptions
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder

if TYPE_CHECKING:
    from vllm_budgetkv.cache.step import Step

QUOTA = Quota(blocks=12, page_tokens=8, num_layers=3, chunk_tokens=24, decode_interval_tokens=16)
OPTIONS = PolicyOptions(sink_tokens=2, window_tokens=8, probe_tokens=8, force_class="dynamic")
# rows that a captured step has room for
CAPTURED_ROWS = 4
VIEWS = {"slice", "select", "view", "as_strided", "detach", "alias", "unsqueeze", "expand"}
WRITES = {"copy_", "append", "retrieve", "attend"}


class Recorder(TorchDispatchMode):
    """Notes the name of every operation that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


class Watched(Lab):
    """Notes what the layers of decode steps do, and how the next step differs in its tensors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            "hybrid", kwargs.pop("quota", QUOTA), pool_blocks=40, options=OPTIONS, **kwargs
        )
        self.names: set[str] = set()
        self.num_decode_layers = 0

    def run_layer(self, step: Step, layer: int, *tensors: torch.Tensor) -> None:
        if not step.is_decode:
            super().run_layer(step, layer, *tensors)
            return
        self.num_decode_layers += 1
        with Recorder() as recorder:
            super().run_layer(step, layer, *tensors)
        self.names |= recorder.names


class Replayed(Lab):
    """Runs decode steps as a graph does: one step, captured before any request, is run again."""

    reads_all_pages = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            "hybrid", kwargs.pop("quota", QUOTA), pool_blocks=40, options=OPTIONS, **kwargs
        )
        self.captured = self.cache.step_to_capture(CAPTURED_ROWS)
        heads = (self.heads * self.group, self.heads, self.heads, self.heads * self.group)
        self.tensors = [torch.zeros(CAPTURED_ROWS, count, self.head_size) for count in heads]
        self.num_replays = 0

    def run_layer(self, step: Step, layer: int, *tensors: torch.Tensor) -> None:
        if not step.is_decode:
            super().run_layer(step, layer, *tensors)
            return
        self.num_replays += 1
        num_rows = len(step.plans)
        for fixed, tensor in zip(self.tensors, tensors, strict=True):
            fixed[:num_rows] = tensor
            fixed[num_rows:] = torch.nan  # padding must reach nobody
        super().run_layer(self.captured, layer, *self.tensors)
        tensors[-1].copy_(self.tensors[-1][:num_rows])


# pages of 8 tokens of 32 channels in float32
RECALL = Recall(
    num_heads=3,
    all_heads=6,
    page_words=512,
    code_words=1,
    slots_share=0.5,
    max_index_share=0.5,
)
RECALLING: dict[str, Any] = {
    "quota": replace(QUOTA, retrieves=True, recall=RECALL),
    "tier_blocks": 100,
}


class WatchedRecall(RecallLab, Watched):
    """Some heads bring tokens back."""


class ReplayedRecall(RecallLab, Replayed):
    """Some heads bring tokens back."""


def decode(lab: Lab) -> dict[str, list[torch.Tensor]]:
    """Two long videos and a short text, 40 tokens of output: what attention gave, by request."""
    clients = [
        Client("video", 206, [Feature(6, 192, 4)]),
        Client("other", 150, [Feature(4, 140, 4)]),
        Client("text", 20),
    ]
    seen: dict[str, list[torch.Tensor]] = {client.request_id: [] for client in clients}
    lab.see = lambda client, layer, out: seen[client.request_id].append(out.clone())  # type: ignore[method-assign]
    for client in clients:
        while client.output_tokens < 1:
            lab.step({client: lab.room(client)})
    for _ in range(40):
        lab.step(dict.fromkeys(clients, 1))
    return seen


def test_the_layers_allocate_nothing_and_ask_nothing() -> None:
    lab = Watched()
    decode(lab)
    assert lab.num_decode_layers == 40 * QUOTA.num_layers
    assert lab.names <= VIEWS | WRITES, lab.names - VIEWS - WRITES
    assert lab.names >= WRITES, "the recorder must see what the layers do"


def test_the_layers_bring_back_without_allocating_or_asking() -> None:
    lab = WatchedRecall(**RECALLING)
    decode(lab)
    assert lab.num_decode_layers == 40 * QUOTA.num_layers
    assert lab.names == lab.names & (VIEWS | WRITES) | {"recall"}
    assert lab.num_checked > 0


def test_the_triton_launchers_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they launch is noted instead of run; the scratch of the first layer serves the rest."""
    pytest.importorskip("triton")
    from tests.ops import ahead_of_time
    from vllm_budgetkv.ops import backend

    lab = Replayed()
    decode(lab)
    monkeypatch.setattr(backend, "of", lambda tensor: "triton")

    def launch_layers() -> list[str]:
        with ahead_of_time.record() as launches:
            for layer in range(QUOTA.num_layers):
                Lab.run_layer(lab, lab.captured, layer, *lab.tensors)
        return [launch.kernel.__name__ for launch in launches]

    launch_layers()
    with Recorder() as recorder:
        names = launch_layers()
    # append, retrieve in two, attend: no row needs a second run of keys here
    assert names == ["append_kernel", "box_kernel", "choose_kernel", "decode_kernel"] * 3
    assert recorder.names <= VIEWS | {"copy_"}, recorder.names - VIEWS


LABS = [(Replayed, Watched, {}), (ReplayedRecall, WatchedRecall, RECALLING)]


@pytest.mark.parametrize(("replayed_lab", "eager_lab", "settings"), LABS, ids=["plain", "recall"])
def test_a_captured_step_replays_every_batch(
    replayed_lab: type[Replayed], eager_lab: type[Watched], settings: dict[str, Any]
) -> None:
    """The same attention, and the lab's own checks of every byte, with padding rows."""
    replayed, eager = replayed_lab(**settings), eager_lab(**settings)
    found, expected = decode(replayed), decode(eager)
    assert replayed.num_replays == eager.num_decode_layers
    for request_id, outs in expected.items():
        for out, other in zip(outs, found[request_id], strict=True):
            torch.testing.assert_close(out, other, rtol=0, atol=0)


@pytest.mark.parametrize("num_rows", [1, CAPTURED_ROWS])
def test_capturing_changes_nothing(num_rows: int) -> None:
    lab = Replayed()
    client = Client("text", 20)
    lab.step({client: 20})
    tables = lab.cache.tables
    before = [lab.pool.raw.clone(), tables.page_table.clone(), tables.lens.clone()]
    captured = lab.cache.step_to_capture(num_rows)
    for layer in range(QUOTA.num_layers):
        Lab.run_layer(lab, captured, layer, *(x[:num_rows] for x in lab.tensors))
    after = [lab.pool.raw, tables.page_table, tables.lens]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_graph_has_no_more_rows_than_requests_have_slots() -> None:
    with pytest.raises(ValueError, match="graph of 7 rows was asked for, but --max-num-seqs is 6"):
        Replayed().cache.step_to_capture(7)


def test_the_builder_offers_it_to_vllm() -> None:
    lab = Replayed()
    builder = bound()
    builder.bind(lab.cache, lambda common: [])
    step = builder.build_for_cudagraph_capture(batch(num_reqs=3))
    assert step is not None and step.is_decode and step.starts[-1] == 3
    assert step.rows.slots.data_ptr() == lab.cache.rows.slots.data_ptr()
    support = BudgetMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_a_step_without_our_metadata_is_an_error() -> None:
    lab = Replayed()
    lab.step({Client("text", 20): 20})
    lab.cache.plan_step({"text": 1})
    with pytest.raises(RuntimeError, match="computed 1 requests without the metadata"):
        lab.cache.end_step()
