"""What importing the package costs and needs, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = "import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
WITHOUT_VLLM = (
    "arithmetic.quota",
    "arithmetic.layout",
    "policy",
    "policy.option",
    "ops",
    "cache.build",
    "cache.rehearsal",
    "cache.probe.rotaries",
    "start.config",
    "start.options_page",
    "start.cli",
    "start.activation",
    "start.upstream",
    "start.upstream_reads",
    "start.refusals",
    "worker.engine_view",
    "plugin",
    "batch.folder",
    "batch.answerer",
    "ray",
)


def run(program: str) -> str:
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_package_imports_nothing_heavy() -> None:
    """vLLM imports every plugin in every process, also where it is not used."""
    loaded = run("import sys, vllm_budgetkv\nsys.stdout.write(' '.join(sys.modules))").split()
    heavy = {"torch", "vllm", "numpy", "triton", "transformers"}
    assert heavy.isdisjoint(loaded)
    own = [name for name in loaded if name.startswith("vllm_budgetkv")]
    assert own == ["vllm_budgetkv"]


def test_most_of_it_works_without_vllm_and_triton() -> None:
    """In one process: a blocked module fails whoever imports it first."""
    lines = "\n".join(f"import vllm_budgetkv.{module}" for module in WITHOUT_VLLM)
    run(BLOCK.format(blocked=("vllm", "triton", "ray")) + lines)


def test_quota_arithmetic_works_without_torch() -> None:
    blocked = ("vllm", "triton", "torch", "numpy")
    run(BLOCK.format(blocked=blocked) + "import vllm_budgetkv.arithmetic.quota")


def test_blocking_works() -> None:
    with pytest.raises(AssertionError, match="vllm"):
        run(BLOCK.format(blocked=("vllm",)) + "import vllm_budgetkv.scheduler.manager")


def test_a_policy_runs_without_vllm() -> None:
    run(
        BLOCK.format(blocked=("vllm", "triton"))
        + """
import torch
from vllm_budgetkv.policy import Observation, PolicyOptions, make_policy

positions = torch.arange(40, dtype=torch.int32).expand(2, -1)
answer = make_policy("window", PolicyOptions(), 8).retain(Observation(
    mass=None, topk_mass=None, value_norms=None, positions=positions,
    lens=torch.tensor([40, 40], dtype=torch.int32), is_vision=positions < 0,
    span_ids=torch.zeros_like(positions), seen_tokens=40, protected_position=40,
    budget_tokens=16, max_head_tokens=32,
))
assert answer.budgets.tolist() == [16, 16]
"""
    )
