"""Two minutes of the pretrained model: what the lab reads is what the model says, and `hybrid` must
not fall below what was recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.real.results import load_plan
from benchmarks.real.tasks import make_examples

if TYPE_CHECKING:
    from benchmarks.real.results import RunResult

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "benchmarks" / "results" / "real_quick.json"
# one example of six, which another order of additions may turn; the log-probability is finer
TOLERANCE = 0.2
LOGPROB_TOLERANCE = 0.1
SECONDS = 1200


@pytest.fixture(scope="module")
def measured(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """The plan `quick`, measured now."""
    out = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-m", "benchmarks.real.run", "--plan", "quick", "--fresh"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return load_plan(out / "real_quick.json")[1]


@pytest.mark.engine
@pytest.mark.timeout(SECONDS)
def test_hybrid_is_as_good_as_recorded(measured: list[RunResult]) -> None:
    recorded = load_plan(RECORDED)[1]
    for now, then in zip(measured, recorded, strict=True):
        tasks = list(then.right)
        assert now.pooled(tasks).value >= then.pooled(tasks).value - TOLERANCE, now.name
        assert now.logprob(tasks) >= then.logprob(tasks) - LOGPROB_TOLERANCE, now.name


@pytest.mark.engine
@pytest.mark.timeout(SECONDS)
def test_log_probabilities_are_those_of_transformers(
    measured: list[RunResult], smollm2: Path, tokenizer: Any
) -> None:
    """On the full cache, for the first example: of every token of the right answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    full = measured[0]
    (example,) = make_examples("single", full.length_tokens, 1, tokenizer)
    prompt, told = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (example.prompt(tokenizer), example.told)
    )
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + told])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(dim=-1)[torch.arange(len(told)), told]
    assert full.logprobs["single"][0] == pytest.approx(logprobs.mean().item(), abs=2e-3)
