"""Steps that are scheduled while others are under way, as the stages of a pipeline have them."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

import pytest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import Core, configure

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.core.sched.output import SchedulerOutput

# tokens of prompt and output: two that are compressed, one of them long; two that fit
LENGTHS = {"long": (700, 9), "compressed": (150, 30), "grows": (40, 90), "short": (9, 5)}


class Pipe:
    """A core whose steps come back `depth` steps later.

    Attributes:
        ends: of each request, tokens that it had computed behind each of its steps.
        early: requests that were scheduled with a token that was not there yet.
    """

    def __init__(self, core: Core, depth: int) -> None:
        self.core, self.depth = core, depth
        self.under_way: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()
        self.ends: dict[str, list[int]] = defaultdict(list)
        self.early: set[str] = set()

    def run(self, aborts: dict[int, str] | None = None) -> None:
        """Serve all; `aborts` are ids by the number of the step behind which their client left."""
        scheduler = self.core.scheduler
        for number in range(5000):
            if not scheduler.has_unfinished_requests() and not self.under_way:
                return
            self._schedule()
            if aborts and number in aborts:
                scheduler.finish_requests(aborts[number], RequestStatus.FINISHED_ABORTED)
            # a pipeline that nothing can enter empties first
            while len(self.under_way) >= self.depth or (
                self.under_way and not self.under_way[-1][0].num_scheduled_tokens
            ):
                self._give()
        raise AssertionError(f"unfinished: {sorted(scheduler.requests)}")

    def _schedule(self) -> None:
        scheduler = self.core.scheduler
        scheduled = scheduler.schedule()
        sampled: list[list[int]] = []
        for request_id in scheduled.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            self.ends[request_id].append(request.num_computed_tokens)
            if request.num_computed_tokens > request.num_tokens:
                self.early.add(request_id)
            sampled.append([] if request.is_prefill_chunk else [request.num_computed_tokens])
        self.under_way.append((scheduled, sampled))

    def _give(self) -> None:
        scheduled, sampled = self.under_way.popleft()
        ids = [*scheduled.num_scheduled_tokens]
        index = {request_id: row for row, request_id in enumerate(ids)}
        ran = ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=sampled)
        for of_client in self.core.scheduler.update_from_output(scheduled, ran).values():
            for output in of_client.outputs:
                self.core.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)


def served(
    model: Path,
    depth: int,
    aborts: dict[int, str] | None = None,
    *,
    ahead: bool = False,
    is_v2: bool = False,
) -> Pipe:
    """All of `LENGTHS`, served by two stages.

    Args:
        model: the model.
        depth: steps that are under way at once.
        aborts: ids by the number of the step behind which their client left.
        ahead: with asynchronous scheduling.
        is_v2: as for model runner V2.
    """
    config = configure(model, "hybrid", pipeline_parallel_size=2)
    # a CPU has none
    config.scheduler_config.async_scheduling = ahead
    core = Core(config, pool_blocks=30)
    core.scheduler.use_v2_model_runner = is_v2
    for name, (prompt_tokens, output_tokens) in LENGTHS.items():
        core.add(name, prompt_tokens, output_tokens)
    pipe = Pipe(core, depth)
    pipe.run(aborts)
    assert not core.scheduler.requests
    assert not core.scheduler.lookaheads.parents
    assert core.scheduler.kv_cache_manager.usage == 0
    return pipe


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_all_are_served_and_compressed_at_the_same_points(qwen2: Path, depth: int) -> None:
    """With two steps under way a request was scheduled with a token that nobody had: ours was
    vLLM's asynchronous scheduler, though the engine was told to wait for tokens."""
    one, pipe = served(qwen2, 1), served(qwen2, depth)
    assert not pipe.early
    for name, (_, output_tokens) in LENGTHS.items():
        assert len(pipe.core.tokens[name]) == output_tokens
        assert pipe.core.tokens[name] == one.core.tokens[name]
    assert pipe.ends["long"] == one.ends["long"]


@pytest.mark.parametrize("is_v2", [False, True])
def test_ahead_of_its_tokens_where_that_is_asked_for(qwen2: Path, is_v2: bool) -> None:
    """Runner V2 has a step more under way than there are stages, and turns two steps apart."""
    one, pipe = served(qwen2, 1), served(qwen2, 2 + is_v2, ahead=True, is_v2=is_v2)
    assert pipe.early
    for name, (_, output_tokens) in LENGTHS.items():
        assert len(pipe.core.tokens[name]) == output_tokens
        assert pipe.core.tokens[name] == one.core.tokens[name]
    assert pipe.ends["long"] == one.ends["long"]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 5, 12, 40])
def test_a_client_leaves_while_its_step_is_under_way(qwen2: Path, number: int, ahead: bool) -> None:
    pipe = served(qwen2, 2, {number: "long"}, ahead=ahead)
    for name in ("compressed", "grows", "short"):
        assert len(pipe.core.tokens[name]) == LENGTHS[name][1]
