"""What `doctor` says of a good installation, and of ones that were broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import vllm

from vllm_budgetkv import ops
from vllm_budgetkv.cli import installation, kernels
from vllm_budgetkv.cli.main import main
from vllm_budgetkv.start import platforms, upstream
from vllm_budgetkv.start.upstream import Touchpoint
from vllm_budgetkv.start.upstream_reads import Reads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
Findings = dict[str, dict[str, str]]


@pytest.fixture
def doctor(
    environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, Findings]]:
    """Exit status and findings by name."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def run() -> tuple[int, Findings]:
        status = main(["doctor", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["is_well"] == (status == 0)
        return status, {finding["name"]: finding for finding in told["findings"]}

    return run


def states(found: Findings) -> dict[str, str]:
    """States that are not ok."""
    return {name: item["state"] for name, item in found.items() if item["state"] != "ok"}


def test_all_is_well(doctor: Any) -> None:
    status, found = doctor()
    assert status == 0 and states(found) == {}
    assert vllm.__version__ in found["vLLM"]["told"]
    assert "rows of docs/upstream.md fit" in found["symbols of vLLM"]["told"]
    assert "cpu, on which the tests have run" in found["device"]["told"]
    for op in (name for name in ops.__all__ if name.islower()):
        assert op in found["kernels for CPUs"]["told"]
    assert found["instruction set"]["told"].startswith(torch.ops.budgetkv.get_isa())


@pytest.mark.parametrize(
    ("allowed", "to_do"),
    [
        ("", "unset it, or set it to budgetkv"),
        ("lora", "unset it, or set it to lora,budgetkv"),
        ("lora,budgetkv", None),
    ],
)
def test_the_allow_list(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, allowed: str, to_do: str | None
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    status, found = doctor()
    if to_do is None:
        assert status == 0
    else:
        assert status == 1
        assert states(found) == {"VLLM_PLUGINS": "wrong", "loaded by vLLM": "wrong"}
        assert found["VLLM_PLUGINS"]["to_do"] == to_do


def test_another_vllm(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    status, found = doctor()
    assert status == 1 and states(found) == {"vLLM": "wrong"}
    assert found["vLLM"]["to_do"].startswith(f"install vLLM {upstream.SUPPORTED}")


def test_a_symbol_that_is_gone(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler.tidy", "override", "test")
    monkeypatch.setattr(upstream, "TOUCHPOINTS", (*upstream.TOUCHPOINTS, gone))
    status, found = doctor()
    assert status == 1 and states(found) == {"symbols of vLLM": "wrong"}
    assert (
        "vllm.v1.core.sched.scheduler.Scheduler.tidy: missing" in (found["symbols of vLLM"]["told"])
    )


def test_a_symbol_that_only_plan_needs(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Reads("vllm.multimodal.encoder_budget", "MultiModalBudget", "test", ("mood",))
    monkeypatch.setattr(installation, "PLAN_READS", (gone,))
    status, found = doctor()
    assert status == 0 and states(found) == {"symbols of vLLM": "note"}
    assert "MultiModalBudget.mood: missing" in found["symbols of vLLM"]["told"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "nobody offers budgetkv to vllm.general_plugins"),
        (["old_budgetkv:go"], "budgetkv is old_budgetkv:go, not vllm_budgetkv:register"),
    ],
)
def test_the_entry_point(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, values: list[str], told: str
) -> None:
    points = [EntryPoint("budgetkv", value, "vllm.general_plugins") for value in values]
    monkeypatch.setattr(installation, "entry_points", lambda group: points)
    status, found = doctor()
    assert status == 1 and states(found) == {"entry point": "wrong"}
    assert told in found["entry point"]["told"]


@pytest.mark.parametrize(
    ("platform", "state", "told"),
    [
        (platforms.CUDA, "note", "cuda, on which not all tests have passed yet"),
        (None, "wrong", "the plugin has kernels for CPUs and NVIDIA GPUs"),
    ],
)
def test_other_devices(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, platform: Any, state: str, told: str
) -> None:
    monkeypatch.setattr(platforms, "known", lambda _: platform)
    status, found = doctor()
    assert status == (state == "wrong") and states(found) == {"device": state}
    assert told in found["device"]["told"]


def test_kernels_that_are_older_than_the_package(
    doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "__all__", [*ops.__all__, "teleport"])
    status, found = doctor()
    assert status == 1 and states(found) == {"kernels for CPUs": "wrong"}
    assert "teleport are missing" in found["kernels for CPUs"]["told"]


def test_kernels_of_another_copy(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found_elsewhere = SimpleNamespace(origin=str(tmp_path / "_C.abi3.so"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: found_elsewhere)
    status, found = doctor()
    assert status == 0 and states(found) == {"kernels for CPUs": "note"}
    assert "not those of" in found["kernels for CPUs"]["told"]


@pytest.fixture
def slowest_kernels() -> Iterator[None]:
    taken = torch.ops.budgetkv.get_isa()
    torch.ops.budgetkv.set_isa("generic")
    yield
    torch.ops.budgetkv.set_isa(taken)


@pytest.mark.usefixtures("slowest_kernels")
def test_kernels_that_could_be_faster(doctor: Any) -> None:
    status, found = doctor()
    assert status == 0
    assert torch.ops.budgetkv.get_isa() == "generic", "what was in use must be put back"
    told = found["instruction set"]["told"]
    assert told.startswith("generic") and ("would be faster" in told) == (
        "this CPU runs generic" not in told
    )


def test_no_triton_on_a_gpu(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise kernels.PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", missing)
    assert doctor()[0] == 0, "a CPU needs none"
    monkeypatch.setattr(kernels, "device_of_vllm", lambda: "cuda")
    status, found = doctor()
    assert status == 1 and found["kernels for GPUs"]["state"] == "wrong"


def test_a_package_that_is_not_installed(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", missing)
    assert doctor()[1]["vllm-budgetkv"]["state"] == "wrong"
    older = SimpleNamespace(version="0.0.9")
    monkeypatch.setattr(installation, "distribution", lambda name: older)
    assert "but version 0.0.9 is installed" in doctor()[1]["vllm-budgetkv"]["told"]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("columns", [80, 140])
def test_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert main(["doctor"]) == 1
    page = capsys.readouterr().out
    assert "WRONG" in page and "-> unset it, or set it to lora,budgetkv" in page
    assert page.rstrip().endswith("2 things are wrong.")
    assert all(len(line) <= columns for line in page.splitlines())


def in_a_process(package: Path, variables: dict[str, str], setup: str = "") -> tuple[int, Findings]:
    """`doctor` in a fresh process, with the package of this folder."""
    program = f"import sys\n{setup}\nfrom vllm_budgetkv.cli.main import main\n"
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program + "sys.exit(main(['doctor', '--json']))"],
        cwd=package,  # which comes first on the path
        env=os.environ | {"PYTHONPATH": str(package)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.stdout, process.stderr
    told = json.loads(process.stdout)
    return process.returncode, {item["name"]: item for item in told["findings"]}


@pytest.mark.parametrize(
    ("variables", "name", "told"),
    [
        ({"VLLM_BUDGETKV_OPS": "fast"}, "VLLM_BUDGETKV_OPS", "fast is not a backend"),
        ({"VLLM_BUDGETKV_ISA": "mmx"}, "instruction set", "instruction set mmx is unknown"),
    ],
)
def test_variables_that_say_nothing(variables: dict[str, str], name: str, told: str) -> None:
    status, found = in_a_process(ROOT, variables)
    assert status == 1
    assert found[name]["state"] == "wrong" and told in found[name]["told"]


@pytest.mark.parametrize(("backend", "state"), [("kernels", "wrong"), ("reference", "note")])
def test_kernels_that_are_missing(tmp_path: Path, backend: str, state: str) -> None:
    """A package that was built with BUDGETKV_NO_EXT=1."""
    package = tmp_path / "vllm_budgetkv"
    shutil.copytree(ROOT / "vllm_budgetkv", package, ignore=shutil.ignore_patterns("*.so", "*pyc"))
    # an editable installation would lend its kernels
    setup = "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]"
    status, found = in_a_process(tmp_path, {"VLLM_BUDGETKV_OPS": backend}, setup)
    assert str(package) in found["vllm-budgetkv"]["told"]
    assert found["kernels for CPUs"]["state"] == state
    assert (
        "the compiled kernels vllm_budgetkv/_C*.so are missing"
        in (found["kernels for CPUs"]["told"])
    )
    assert "pip install" in found["kernels for CPUs"]["to_do"]
    assert status == (state == "wrong")


def test_no_vllm() -> None:
    status, found = in_a_process(ROOT, {}, "sys.modules['vllm'] = None")
    assert status == 1
    assert found["vLLM"]["told"] == "not installed"
    assert "symbols of vLLM" not in found and "device" not in found
