"""Starts engine jobs in fresh processes and gives their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e import devices

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

VISION = {
    "limit_mm_per_prompt": {"image": 8, "video": 1},
    # every frame that is sent; vLLM takes 32 of them by default
    "media_io_kwargs": {"video": {"num_frames": -1}},
}


def environment(*, runner: str = "v1", stock: bool = False) -> dict[str, str]:
    """Variables of an engine process: model runner `v1` or `v2`; `stock` loads no plugin at all."""
    variables = os.environ | ENVIRONMENT
    variables["PYTHONPATH"] = str(Path(__file__).parents[2])
    if stock:
        variables["VLLM_PLUGINS"] = ""
    if runner == "v2":
        # what interprets kernels adds a folder to it
        os.environ["PYTHONPATH"] = variables["PYTHONPATH"]
    return variables | devices.of_runner(runner)


def run(
    tmp_path: Path,
    model: Path,
    requests: list[dict[str, Any]],
    *,
    budget: dict[str, Any] | None = None,
    runner: str = "v1",
    stock: bool = False,
    preempts: tuple[int, ...] = (),
    session: bool = False,
    starts_as_on_gpu: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Answers of `requests` from one engine; see `tests.e2e.job` for their form.

    `starts_as_on_gpu`: with what vLLM does on a GPU only; see `tests.e2e.gpu_start`.
    """
    if starts_as_on_gpu and devices.ON_GPU:
        engine |= devices.GRAPHS
    arguments = arguments_of(model, **engine)
    if budget is not None:
        arguments["additional_config"] = {"budgetkv": devices.allowed(budget)}
    job = {
        "engine": arguments,
        "requests": requests,
        "preempts": preempts,
        "session": session,
        "starts_as_on_gpu": starts_as_on_gpu,
    }
    return answer_of("tests.e2e.job", job, tmp_path, environment(runner=runner, stock=stock))


def run_budgets(
    tmp_path: Path,
    model: Path,
    requests: list[dict[str, Any]],
    budgets: list[dict[str, Any]],
    **engine: Any,
) -> dict[str, Any]:
    """What `run` answers, by policy: one engine after another in one process."""
    runs = {budget["policy"]: {"budget": budget, "requests": requests} for budget in budgets}
    return run_each(tmp_path, model, runs, **engine)


def run_each(
    tmp_path: Path,
    model: Path,
    runs: dict[str, dict[str, Any]],
    *,
    runner: str = "v1",
    **engine: Any,
) -> dict[str, Any]:
    """What `run` answers, by name of the run, which has `requests` and a `budget` or None.

    See `tests.e2e.budgets_job` for what else a run may have.
    """
    job = {"engine": arguments_of(model, **engine), "runs": runs}
    return answer_of("tests.e2e.budgets_job", job, tmp_path, environment(runner=runner))


def run_rotaries(tmp_path: Path, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By name of the model, how its queries turn; `models` holds arguments of engines."""
    return answer_of("tests.e2e.rotaries_job", {"models": models}, tmp_path, environment())


def arguments_of(model: Path, **engine: Any) -> dict[str, Any]:
    """Arguments of an engine, those of the tests unless `engine` says otherwise."""
    return {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "block_size": 32,
        "disable_log_stats": True,
        **devices.ENGINE,
        **(VISION if "vl" in model.name else {}),
        **engine,
    }


def answer_of(
    module: str,
    job: dict[str, Any],
    tmp_path: Path,
    variables: dict[str, str],
    timeout_seconds: float = 300,
) -> dict[str, Any]:
    """Run a module on a job in a process of its own.

    Raises:
        AssertionError: it failed; with the end of what it said.
    """
    answer_file = tmp_path / "answer.json"
    answer_file.unlink(missing_ok=True)
    process = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps({**job, "answer_file": str(answer_file)}),
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    if process.returncode or not answer_file.exists():
        raise AssertionError(f"the engine failed:\n{process.stderr[-6000:]}")
    return json.loads(answer_file.read_text(encoding="utf-8"))


def tokens_of(answer: dict[str, Any]) -> dict[str, list[int]]:
    """Generated tokens by request name."""
    return {name: found["tokens"] for name, found in sorted(answer["answers"].items())}
