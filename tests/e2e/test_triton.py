"""The Triton kernels in a real engine: Model Runner V2, all under Triton's interpreter.

The engine starts as on a GPU, so it rehearses, warms up and replays its decode steps. Then one
short video beyond its quota passes every kernel: look-ahead, chunks that are compressed, and
decode with retrieval and compactions. The C++ ops must give the same tokens in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.job import TRITON_KERNELS
from tests.e2e.test_bound import check_bound

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

ENGINE = {"block_size": 8, "num_gpu_blocks_override": 32, "max_model_len": 512, "max_num_seqs": 2}
BUDGET = {
    "policy": "hybrid",
    "page_quota": 8,
    "chunk_tokens": 32,
    "decode_interval_tokens": 4,
    "window_tokens": 4,
    "probe_tokens": 8,
    "force_class": "dynamic",
    "merge": "value",
    "check_ledger": True,
}
OPS = ("append", "attend", "score", "contrast", "select", "merge", "compact", "digest", "retrieve")
REQUESTS: list[dict[str, Any]] = [
    {
        "name": "video",
        "content": [{"video": 12, "size_pixels": [84, 56]}, {"text": "Which?"}],
        "max_tokens": 10,
    },
    {"name": "text", "content": [{"text": "Hi"}], "max_tokens": 4, "arrives": 2},
]


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_same_tokens_as_the_cpp_ops(
    tmp_path: Path, vision_model: Path, monkeypatch: pytest.MonkeyPatch, cache_dtype: str
) -> None:
    engine = ENGINE | {"kv_cache_dtype": cache_dtype}
    cpp = run(tmp_path, vision_model, REQUESTS, budget=BUDGET, **engine)
    monkeypatch.setenv("VLLM_BUDGETKV_OPS", "triton")
    as_on_gpu = {"runner": "v2", "starts_as_on_gpu": True}
    triton = run(tmp_path, vision_model, REQUESTS, budget=BUDGET, **as_on_gpu, **engine)
    assert triton["engine"]["runner"] == "vllm.v1.worker.cpu.model_runner"
    check_bound(triton)
    assert not cpp["engine"]["kernels"]
    ops = [*OPS, *["quantise"] * (cache_dtype == "fp8")]
    assert {f"{TRITON_KERNELS}{op}" for op in ops} <= set(triton["engine"]["kernels"])
    assert tokens_of(triton) == tokens_of(cpp)
    assert triton["replays"], "decode must come from graphs"
