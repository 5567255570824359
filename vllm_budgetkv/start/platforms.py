"""The devices that the plugin knows: vLLM's worker on each, ours, and how our backend gets in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.platforms.interface import Platform as VllmPlatform


@dataclass(frozen=True)
class Platform:
    """One kind of device.

    Args:
        device: as messages name it.
        stock_worker: class that vLLM would run.
        worker: our subclass of it.
        backend_slot: member of `AttentionBackendEnum` whose class we are while our model loads.
        selects_slot: whether the slot must be selected; else vLLM takes it by itself.
        window_backend: class for layers with windows, where vLLM's own demands another buffer.
        is_proven: whether the tests have run on such a device.
    """

    device: str
    stock_worker: str
    worker: str
    backend_slot: str
    selects_slot: bool
    window_backend: str | None
    is_proven: bool


CPU = Platform(
    device="cpu",
    stock_worker="vllm.v1.worker.cpu_worker.CPUWorker",
    worker="vllm_budgetkv.worker.cpu_worker.BudgetCPUWorker",
    backend_slot="CPU_ATTN",
    selects_slot=False,
    window_backend="vllm_budgetkv.worker.cpu_windows.CPUWindowBackend",
    is_proven=True,
)
CUDA = Platform(
    device="cuda",
    stock_worker="vllm.v1.worker.gpu_worker.Worker",
    worker="vllm_budgetkv.worker.worker.BudgetWorker",
    backend_slot="CUSTOM",
    selects_slot=True,
    window_backend=None,
    is_proven=False,
)


def known(platform: VllmPlatform) -> Platform | None:
    """Ours for a platform of vLLM; None if there are no kernels for it."""
    if platform.is_cpu():
        return CPU
    return CUDA if platform.is_cuda() else None


def current() -> Platform:
    """That of this process, which `refusals.check` has let through."""
    from vllm.platforms import current_platform

    platform = known(current_platform)
    assert platform is not None
    return platform
