"""Which device vLLM would run on, and whether the plugin serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.cli.findings import Finding, State
from vllm_budgetkv.start import platforms

if TYPE_CHECKING:
    from collections.abc import Iterator


def device_of_vllm() -> str | None:
    """vLLM's name of the device, as `cpu`, empty if it sees none; None where vLLM is not there."""
    try:
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError):
        return None
    return str(current_platform.device_type or "")


def findings() -> Iterator[Finding]:
    """The device, if vLLM can say."""
    device = device_of_vllm()
    if device is None:
        return
    from vllm.platforms import current_platform

    name, found = "device", platforms.known(current_platform)
    if found is None:
        seen = repr(device) if device else "none that vLLM knows"
        yield Finding(
            name,
            State.WRONG,
            f"{seen}: the plugin has kernels for CPUs and NVIDIA GPUs",
            "run where one of these is, with the build of vLLM for it",
        )
    elif found.is_proven:
        yield Finding(name, State.OK, f"{found.device}, on which the tests have run")
    else:
        yield Finding(
            name,
            State.NOTE,
            f"{found.device}, on which not all tests have passed yet",
            "start with --kv-unproven-device, and compare answers before use",
        )
