"""Layers with windows or chunks beside ours: vLLM's own backend, while our model loads."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import attention, chunked_local_attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_budgetkv.start import platforms, upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend


@contextmanager
def windows_left_to_vllm(vllm_config: VllmConfig, keeps_windows: bool) -> Iterator[None]:
    """Inside, layers with windows or chunks get the backend that vLLM would take without us.

    Args:
        vllm_config: of the engine, whose selected backend is ours.
        keeps_windows: whether the model may have such layers; without, nothing changes.
    """
    if not keeps_windows:
        yield
        return
    name = "get_attn_backend"
    for_layers = partial(_choose, vllm_config)
    for_chunks = partial(_choose, vllm_config, is_chunked=True)
    with (
        upstream.replaced_in(attention, name, for_layers),
        upstream.replaced_in(chunked_local_attention, name, for_chunks),
    ):
        yield


def _choose(
    vllm_config: VllmConfig,
    original: Callable[..., type[AttentionBackend]],
    *args: Any,
    is_chunked: bool = False,
    has_sliding_window: bool = False,
    **kwargs: Any,
) -> type[AttentionBackend]:
    ask = partial(original, *args, has_sliding_window=has_sliding_window, **kwargs)
    return _vllms_own(vllm_config, ask) if is_chunked or has_sliding_window else ask()


def _vllms_own(
    vllm_config: VllmConfig, ask: Callable[[], type[AttentionBackend]]
) -> type[AttentionBackend]:
    """What `ask` answers while our backend is neither registered nor selected."""
    platform = platforms.current()
    slot, config = AttentionBackendEnum[platform.backend_slot], vllm_config.attention_config
    ours, selected = slot.get_path(), config.backend
    slot.clear_override()
    config.backend = None
    _cached_get_attn_backend.cache_clear()
    try:
        found = ask()
    finally:
        register_backend(slot, ours)
        config.backend = selected
        _cached_get_attn_backend.cache_clear()
    if platform.window_backend is None:
        return found
    return resolve_obj_by_qualname(platform.window_backend)
