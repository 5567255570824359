"""The estimate of activations, against what really lives in the vision tower of Transformers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cli.folders import SEVEN_B
from vllm_budgetkv.cli.activations import layer_elements
from vllm_budgetkv.testing.models import qwen2_5_vl_config
from vllm_budgetkv.testing.shapes import VisionShape
from vllm_budgetkv.testing.tokenizer import build_tokenizer


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for tensor in answer if isinstance(answer, tuple | list) else (answer,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return answer

    def note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.seen or not size:
            return
        self.seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.live -= size


@pytest.mark.parametrize(
    ("width", "mlp_width", "grid"), [(1280, 3420, (1, 16, 24)), (640, 2560, (2, 12, 16))]
)
def test_a_tower_takes_what_is_estimated(
    width: int, mlp_width: int, grid: tuple[int, int, int]
) -> None:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    shape = VisionShape(depth=2, width=width, head_dim=80)
    config = qwen2_5_vl_config(SEVEN_B, shape, build_tokenizer(4096)).vision_config
    config.intermediate_size, config._attn_implementation = mlp_width, "sdpa"
    tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    num_patches = grid[0] * grid[1] * grid[2]
    patches = torch.zeros(num_patches, 3 * 2 * 14 * 14)
    with torch.inference_mode(), LiveBytes() as live:
        tower(patches, grid_thw=torch.tensor([grid]))
    estimate = num_patches * layer_elements(width, mlp_width) * 4
    assert 0.9 < live.peak / estimate < 1.1
