"""Whether vLLM is here, fits, and loads the plugin."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import vllm_budgetkv
from vllm_budgetkv.cli.findings import Finding, State
from vllm_budgetkv.policy.option import flag_of
from vllm_budgetkv.start import upstream
from vllm_budgetkv.start.upstream_reads import PLAN_READS, READS

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "vllm-budgetkv"
GROUP = "vllm.general_plugins"
PLUGIN = "budgetkv"
ENTRY = "vllm_budgetkv:register"
ALLOWED = "VLLM_PLUGINS"
REINSTALL = "install the package again: pip install . --no-build-isolation"
A_FLAG = flag_of("policy")


def findings() -> Iterator[Finding]:
    """Package, vLLM, entry point, allow-list, and each symbol of vLLM's that is touched."""
    yield _package()
    vllm = _vllm()
    yield vllm
    yield _entry_point()
    yield _allowed()
    if vllm.state is State.OK:
        yield _loaded()
        yield _touchpoints()


def _package() -> Finding:
    folder = Path(vllm_budgetkv.__file__).parent
    name = "vllm-budgetkv"
    told = f"{vllm_budgetkv.__version__} in {folder}, Python {platform.python_version()}"
    try:
        installed = distribution(PACKAGE).version
    except PackageNotFoundError:
        return Finding(
            name, State.WRONG, f"{told}; not installed, only found on the path", REINSTALL
        )
    if installed != vllm_budgetkv.__version__:
        told += f", but version {installed} is installed"
        return Finding(name, State.WRONG, told, REINSTALL)
    return Finding(name, State.OK, told)


def _vllm() -> Finding:
    """Importing it takes seconds, and shows what a listing of packages does not."""
    install = f"install vLLM {upstream.SUPPORTED}"
    if find_spec("vllm") is None:
        return Finding("vLLM", State.WRONG, "not installed", install)
    try:
        import vllm
    except (ImportError, OSError, RuntimeError) as error:
        told = f"cannot be imported: {type(error).__name__}: {error}"
        return Finding("vLLM", State.WRONG, told, f"mend the environment, or {install}")
    told = f"{vllm.__version__} in {Path(vllm.__file__).parent}"
    if upstream.minor_of(vllm.__version__) not in upstream.SUPPORTED_MINORS:
        told += f"; this package supports {upstream.SUPPORTED}"
        return Finding("vLLM", State.WRONG, told, f"{install}, or another {PACKAGE}")
    return Finding("vLLM", State.OK, told)


def _entry_point() -> Finding:
    """What vLLM finds; a stale installation may hide ours or bring it twice."""
    name = "entry point"
    found = [point.value for point in entry_points(group=GROUP) if point.name == PLUGIN]
    if not found:
        told = f"nobody offers {PLUGIN} to {GROUP}, so vLLM does not see the plugin"
        return Finding(name, State.WRONG, told, REINSTALL)
    others = sorted({value for value in found if value != ENTRY})
    if others:
        told = f"{GROUP}: {PLUGIN} is {', '.join(others)}, not {ENTRY}"
        return Finding(name, State.WRONG, told, f"uninstall what offers it, then {REINSTALL}")
    return Finding(name, State.OK, f"{GROUP}: {PLUGIN} = {ENTRY}")


def _allowed() -> Finding:
    allowed = os.environ.get(ALLOWED)
    if allowed is None:
        return Finding(ALLOWED, State.OK, "unset: vLLM loads every plugin")
    names = allowed.split(",")
    if PLUGIN in names:
        return Finding(ALLOWED, State.OK, f"{allowed!r} allows {PLUGIN}")
    to_do = f"unset it, or set it to {','.join([*filter(None, names), PLUGIN])}"
    return Finding(ALLOWED, State.WRONG, f"{allowed!r} keeps {PLUGIN} out", to_do)


def _loaded() -> Finding:
    """Let vLLM load it as it does in every process, and look whether its flags are there."""
    name = "loaded by vLLM"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_plugins_by_group
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register = load_plugins_by_group(GROUP).get(PLUGIN)
    if register is None:
        told = "no: the entry point or VLLM_PLUGINS keeps it out, or it cannot be imported"
        return Finding(name, State.WRONG, told, "see the lines above, and the errors of vLLM's log")
    register()
    parser = FlexibleArgumentParser(add_help=False)
    try:
        EngineArgs.add_cli_args(parser)
    except RuntimeError as error:
        # vLLM's defaults ask for a device; the line about it says more
        return Finding(name, State.WRONG, f"yes, but vLLM has no parser here: {error}")
    _, unknown = parser.parse_known_args([A_FLAG, "full"])
    if unknown:
        return Finding(name, State.WRONG, f"it was loaded, but {A_FLAG} is unknown", REINSTALL)
    return Finding(name, State.OK, f"yes, and {A_FLAG} is a flag of vLLM")


def _touchpoints() -> Finding:
    """What an engine's start needs of vLLM, and what `plan` and `inspect` need beside it."""
    name, fix = "symbols of vLLM", f"install a released vLLM {upstream.SUPPORTED}"
    wrong = list(upstream.problems())
    count = len(upstream.TOUCHPOINTS) + len(READS)
    if wrong:
        told = "\n".join([f"{len(wrong)} of {count} rows of docs/upstream.md differ:", *wrong])
        return Finding(name, State.WRONG, told, fix)
    of_plan = list(upstream.problems_of(PLAN_READS))
    if of_plan:
        told = "\n".join(
            ["a server starts, but `vllm-budgetkv plan` or `inspect` misses:", *of_plan]
        )
        return Finding(name, State.NOTE, told, fix)
    return Finding(name, State.OK, f"all {count + len(PLAN_READS)} rows of docs/upstream.md fit")
