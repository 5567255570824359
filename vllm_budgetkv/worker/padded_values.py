"""Values of fewer elements than keys: zeros behind each, as its page is as wide as a key.

Attention over them is attention over the values, with zeros behind each output. A page then takes
what keys and values of one size take: 192 + 192 elements a token in place of 192 + 128.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.functional import pad
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_budgetkv.start import layer_kinds, platforms, upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from vllm.config import ModelConfig
    from vllm.v1.attention.backend import AttentionBackend


def padded(value: torch.Tensor, head_size: int) -> torch.Tensor:
    """[T, H, D] with zeros behind each value of `value`, [T, H, Dv]; itself where Dv is D.

    Args:
        value: Dv at most `head_size`.
        head_size: elements of a key (D).
    """
    missing = head_size - value.shape[-1]
    assert missing >= 0, "values of more elements than keys are refused at start"
    return pad(value, (0, missing)) if missing else value


@contextmanager
def widened(out: torch.Tensor, head_size: int) -> Iterator[torch.Tensor]:
    """Where to write outputs as wide as keys, [T, Hq, D]; `out`, [T, Hq, Dv], then has their front.

    It is `out` itself where Dv is D, and is not initialised otherwise.
    """
    num_elements = out.shape[-1]
    if num_elements == head_size:
        yield out
        return
    wide = out.new_empty(*out.shape[:-1], head_size)
    yield wide
    out.copy_(wide[..., :num_elements])


@contextmanager
def chosen_as_others(model: ModelConfig) -> Iterator[None]:
    """Inside, layers with values of another size than keys get backends as layers without do.

    vLLM's class of the model names a backend of GPUs for them itself, which no choice of vLLM's
    changes: it knows no page of ours, and runs on no CPU.

    Args:
        model: that is loaded inside; nothing changes unless its values are padded.
    """
    if not layer_kinds.pads_values(model):
        yield
        return
    # what it imports is what only this model needs
    from vllm.model_executor.models import mimo_v2

    with upstream.replaced_in(mimo_v2, "Attention", _with_backend):
        yield


def _with_backend(
    original: Callable[..., Any],
    *args: Any,
    per_layer_sliding_window: int | None = None,
    attn_backend: type[AttentionBackend] | None = None,
    head_size_v: int,
    **kwargs: Any,
) -> Any:
    """A layer; on a GPU one with a window gets vLLM's backend for values of another size.

    That of Triton: beside other layers of FlashAttention vLLM plans no steps of it ahead, alone it
    does, as if values were as wide as keys.
    """
    has_window = per_layer_sliding_window is not None
    if attn_backend is not None and has_window and platforms.current().window_backend is None:
        attn_backend = AttentionBackendEnum.TRITON_ATTN_DIFFKV.get_class()
        attn_backend.set_head_size_v(head_size_v)
    else:
        attn_backend = None
    return original(
        *args,
        per_layer_sliding_window=per_layer_sliding_window,
        attn_backend=attn_backend,
        head_size_v=head_size_v,
        **kwargs,
    )
