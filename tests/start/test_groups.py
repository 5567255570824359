"""Groups of layers, against vLLM's own way to form them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import (
    _get_kv_cache_groups_uniform_page_size,
    _pool_bytes_per_block,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.scheduler.spec import QuotaSpec, is_ours, windows_of
from vllm_budgetkv.start.groups import Groups, block_pages_of, page_tokens_of

ATTENTION: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
PAGE_BYTES = FullAttentionSpec(**ATTENTION).page_size_bytes


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 9, 12])
@pytest.mark.parametrize("num_recurrent", [1, 3, 4, 5, 6, 7, 36])
def test_groups_are_vllms(num_layers: int, num_recurrent: int) -> None:
    """How long a block is, whether our layers are one group, and how many groups state has."""
    ours = {f"a{i}": FullAttentionSpec(**ATTENTION) for i in range(num_layers)}
    state = MambaSpec(
        block_size=16, shapes=((4,),), dtypes=(torch.float32,), page_size_padded=PAGE_BYTES
    )
    theirs = {f"s{i}": state for i in range(num_recurrent)}
    found = _get_kv_cache_groups_uniform_page_size({**ours, **theirs})
    groups = Groups(num_layers, num_recurrent, state_blocks=1)
    kinds = [isinstance(group.kv_cache_spec, MambaSpec) for group in found]
    assert groups.is_split == (len(kinds) - sum(kinds) > 1)
    assert groups.blocks_beside == sum(kinds)
    if not groups.is_split:
        most = max(len(group.layer_names) for group in found)
        assert groups.block_layers == max(most, num_layers)


def windowed(num_layers: int, windows: dict[int, int], is_chunked: bool) -> dict[str, Any]:
    """Specs of our layers and of others, by tokens of their window, as vLLM's CPU worker says."""
    sizes = {**ATTENTION, "block_size": 16}
    quota = Quota(
        blocks=64,
        page_tokens=16,
        num_layers=num_layers,
        chunk_tokens=256,
        decode_interval_tokens=64,
    )
    ours = QuotaSpec.of(FullAttentionSpec(**sizes), quota)
    specs: dict[str, KVCacheSpec] = {f"a{i}": ours for i in range(num_layers)}
    for tokens, count in windows.items():
        spec: KVCacheSpec
        if is_chunked:
            spec = ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=tokens)
        else:
            spec = SlidingWindowSpec(**sizes | {"block_size": 32}, sliding_window=tokens)
        specs |= {f"w{tokens}.{i}": spec for i in range(count)}
    return specs


def engine_of_windows() -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
        max_in_flight_tokens=512,
    )


@pytest.mark.parametrize("is_chunked", [False, True], ids=["sliding", "chunked"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 12])
@pytest.mark.parametrize(
    "windows", [{64: 1}, {64: 4}, {64: 5, 100: 7}, {1024: 36}], ids=lambda value: str(value)
)
def test_groups_with_windows_are_vllms(
    num_layers: int, windows: dict[int, int], is_chunked: bool
) -> None:
    """Our layers are one group; blocks of the others, and how long a block is for all."""
    engine, specs = engine_of_windows(), windowed(num_layers, windows, is_chunked)
    found = get_kv_cache_groups(engine, dict(specs))
    (ours,) = (group for group in found if is_ours(group.kv_cache_spec))
    assert len(ours.layer_names) == Groups(num_layers, num_windowed=1).block_layers == num_layers
    blocks = [
        -(-spec.max_memory_usage_bytes(engine) // spec.page_size_bytes)
        for group in found
        if not is_ours(spec := group.kv_cache_spec)
    ]
    windows_take = windows_of(specs.values(), engine)
    assert windows_take is not None
    assert windows_take.blocks == sum(blocks)
    assert windows_take.block_bytes == _pool_bytes_per_block(engine, found)


def test_one_kind_of_layers_is_one_group() -> None:
    assert (Groups(28).block_layers, Groups(28).blocks_beside, Groups(28).is_split) == (
        28,
        0,
        False,
    )


@pytest.mark.parametrize(
    ("is_hybrid", "is_asked", "block_size", "page_tokens"),
    [
        (False, False, 128, 128),
        (False, True, 48, 48),
        (True, False, 128, 16),
        (True, True, 32, 32),
        (True, True, 48, 16),
        (True, True, 544, 16),
    ],
)
def test_tokens_of_a_page(
    is_hybrid: bool, is_asked: bool, block_size: int, page_tokens: int
) -> None:
    """Those of a block, but for blocks that are longer than a page can be."""
    cache = SimpleNamespace(block_size=block_size, user_specified_block_size=is_asked)
    model = SimpleNamespace(is_hybrid=is_hybrid)
    engine: Any = SimpleNamespace(cache_config=cache, model_config=model)
    assert page_tokens_of(engine) == page_tokens


@pytest.mark.parametrize(
    ("asked_tokens", "pages"), [(None, 22), (16, 22), (352, 22), (353, 23), (1000, 63)]
)
def test_pages_of_a_block(
    monkeypatch: pytest.MonkeyPatch, asked_tokens: int | None, pages: int
) -> None:
    """Enough for the state of a layer, and for the block that the user asks for."""
    from vllm_budgetkv.start import groups

    monkeypatch.setattr(groups, "state_bytes", lambda config: 22 * 2 * 256 - 5)
    layout: Any = SimpleNamespace(page_tokens=16, page_bytes=256)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_num_kv_heads=lambda parallel_config: 2),
        parallel_config=None,
        cache_config=SimpleNamespace(
            block_size=asked_tokens or 128, user_specified_block_size=asked_tokens is not None
        ),
    )
    assert block_pages_of(config, layout) == pages
