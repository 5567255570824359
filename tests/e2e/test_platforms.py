"""Which worker and which backend a kind of device gets; asked of vLLM's own CUDA platform."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vllm_budgetkv
from vllm_budgetkv.start import platforms
from vllm_budgetkv.start.platforms import CPU, CUDA

vllm_budgetkv.register()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402  (after the plugin, as vLLM itself does)
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from tests.e2e import picture_models  # noqa: E402
from tests.e2e.conftest import MODELS  # noqa: E402
from vllm_budgetkv.start.activation import quota_of  # noqa: E402
from vllm_budgetkv.start.pictures import Pictures  # noqa: E402
from vllm_budgetkv.worker.backend import BudgetBackend  # noqa: E402
from vllm_budgetkv.worker.worker import backend_registered  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config.cache import CacheDType


# configures an engine as on a GPU; vLLM's own choice of a worker is not asked
STARTS_ON_CUDA = """
import sys
import vllm_budgetkv
from vllm_budgetkv.start import platforms
platforms.known = lambda platform: platforms.CUDA
vllm_budgetkv.register()
import torch
from vllm.engine.arg_utils import EngineArgs
stream = torch.cuda.Stream
EngineArgs(
    model=sys.argv[1],
    max_model_len=4096,
    worker_cls=platforms.CUDA.stock_worker,
    additional_config={
        "budgetkv": {"policy": "hybrid", "page_quota": 64, "chunk_tokens": 256,
                     "unproven_device": True}
    },
).create_engine_config()
import vllm_budgetkv.worker.worker
assert torch.cuda.Stream is stream
imported = [name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")]
assert not imported, imported
"""


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin takes this machine for one with an NVIDIA GPU."""
    monkeypatch.setattr(platforms, "known", lambda platform: CUDA)


def create(model: Path, *, unproven_device: bool = True, **engine: Any) -> Any:
    budget = {"policy": "hybrid", "page_quota": 64, "chunk_tokens": 256}
    return EngineArgs(
        model=str(model),
        max_model_len=4096,
        worker_cls=CUDA.stock_worker,
        additional_config={"budgetkv": budget | {"unproven_device": unproven_device}},
        **engine,
    ).create_engine_config()


@pytest.mark.parametrize(
    ("is_cpu", "is_cuda", "expected"),
    [(True, False, CPU), (False, True, CUDA), (False, False, None)],
)
def test_known_devices(is_cpu: bool, is_cuda: bool, expected: platforms.Platform | None) -> None:
    platform: Any = SimpleNamespace(is_cpu=lambda: is_cpu, is_cuda=lambda: is_cuda)
    assert platforms.known(platform) is expected


@pytest.mark.parametrize("platform", [CPU, CUDA], ids=lambda platform: platform.device)
def test_our_worker_goes_before_the_stock_one(platform: platforms.Platform) -> None:
    ours = resolve_obj_by_qualname(platform.worker)
    stock = resolve_obj_by_qualname(platform.stock_worker)
    order = ours.__mro__
    assert order.index(resolve_obj_by_qualname(CUDA.worker)) < order.index(stock)
    assert AttentionBackendEnum[platform.backend_slot]


@pytest.mark.usefixtures("on_cuda")
def test_an_untested_device_is_refused_unless_asked_for(text_model: Path) -> None:
    with pytest.raises(ValueError, match="'cuda' yet: .* try it with --kv-unproven-device"):
        create(text_model, unproven_device=False)


def test_a_device_without_kernels_is_refused(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "known", lambda platform: None)
    with pytest.raises(ValueError, match="no kernels for device 'cpu': run on a CPU or an NVIDIA"):
        create(text_model)


@pytest.mark.usefixtures("on_cuda")
def test_on_a_gpu_our_backend_is_selected(text_model: Path) -> None:
    config = create(text_model)
    assert config.parallel_config.worker_cls == CUDA.worker
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM


@pytest.mark.usefixtures("on_cuda")
def test_on_a_gpu_another_backend_is_refused(text_model: Path) -> None:
    with pytest.raises(ValueError, match="--attention-backend FLASH_ATTN would replace ours"):
        create(text_model, attention_backend="FLASH_ATTN")


@pytest.mark.usefixtures("on_cuda")
def test_on_a_gpu_our_scheduler_keeps_pictures_whole() -> None:
    """There vLLM asks for whole items itself, before we are asked."""
    model = picture_models.build_gemma3(MODELS, 64)
    config = create(model, max_num_batched_tokens=2048, disable_chunked_mm_input=True)
    assert config.scheduler_config.disable_chunked_mm_input is False
    assert Pictures.of(config, quota_of(config)).attend_both_ways


def test_on_a_gpu_nothing_of_vllm_for_cpus_is_imported(text_model: Path) -> None:
    """vLLM's worker for CPUs takes streams and pinned memory from the whole process."""
    subprocess.run([sys.executable, "-c", STARTS_ON_CUDA, str(text_model)], check=True)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_the_cuda_platform_takes_our_backend_and_only_while_registered(
    monkeypatch: pytest.MonkeyPatch, head_size: int, cache_dtype: CacheDType
) -> None:
    """What vLLM asks a backend before it uses it on an H100, answered without one."""
    # the operators of a build for CUDA, which the module loads but the choice does not use
    name = "vllm._C_stable_libtorch"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    capability = DeviceCapability(9, 0)
    monkeypatch.setattr(
        NonNvmlCudaPlatform, "get_device_capability", classmethod(lambda cls, *_: capability)
    )
    wanted = AttentionSelectorConfig(
        head_size=head_size,
        dtype=torch.bfloat16,
        kv_cache_dtype=cache_dtype,
        block_size=16,
        has_sink=True,
        use_mm_prefix=True,
    )

    def select() -> str:
        return NonNvmlCudaPlatform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, wanted)

    with backend_registered():
        assert resolve_obj_by_qualname(select()) is BudgetBackend
    with pytest.raises(ValueError, match="CUSTOM"):
        select()
