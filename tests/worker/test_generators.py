"""Seeds: what a runner does with a request's generator while its prompt comes in chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_budgetkv.worker.generators import rest_in_chunks


class Runner:
    """What vLLM's model runner V1 does with generators: draw for each row, turn chunks back."""

    def __init__(self, device: str, generators: dict[int, Any], discards: list[bool]) -> None:
        self.device = torch.device(device)
        self.input_batch = SimpleNamespace(generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.array(discards))
        self.drawn: dict[int, float] = {}

    def sample_tokens(self, grammar_output: Any) -> str:
        generators = self.input_batch.generators
        self.drawn = {row: float(torch.rand(1, generator=g)) for row, g in generators.items()}
        for row in np.nonzero(self.discard_request_mask.np)[0]:
            if (generator := generators.get(int(row))) is not None:
                generator.set_offset(generator.get_offset() - 4)
        if grammar_output == "fails":
            raise ValueError(grammar_output)
        return "sampled"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_chunk_takes_no_number_from_a_seed() -> None:
    """`RuntimeError: CPU Generator does not use offset` ended the engine."""
    runner = Runner("cpu", {0: seeded(3), 2: seeded(5)}, [False, True, True])
    generators = dict(runner.input_batch.generators)
    rest_in_chunks(runner, is_v2=False)
    assert runner.sample_tokens(None) == "sampled"
    assert runner.drawn.keys() == {0}, "a request in decode draws as before"
    with pytest.raises(ValueError, match="fails"):
        runner.sample_tokens("fails")
    assert runner.input_batch.generators == generators
    runner.discard_request_mask.np[:] = False
    runner.sample_tokens(None)
    assert runner.drawn[2] == float(torch.rand(1, generator=seeded(5))), "the first of its numbers"


@pytest.mark.parametrize(("device", "is_v2"), [("cuda", False), ("cpu", True)])
def test_where_vllm_manages_by_itself_its_own_way_stays(device: str, is_v2: bool) -> None:
    runner = Runner(device, {}, [])
    rest_in_chunks(runner, is_v2)
    assert "sample_tokens" not in vars(runner)
