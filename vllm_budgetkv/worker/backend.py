"""The attention backend: capabilities, spec and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, MambaSpec

from vllm_budgetkv.arithmetic.layout import MAX_HEAD_SIZE, MIN_HEAD_SIZE, SUPPORTED_DTYPES
from vllm_budgetkv.scheduler.spec import WINDOWS, QuotaSpec, foreign_to
from vllm_budgetkv.start import stored
from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config.cache import CacheDType
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

    from vllm_budgetkv.arithmetic.quota import Quota


class BudgetBackend(AttentionBackend):
    """Attention over per-head pages.

    Attributes:
        quota: the largest of a request.
        computed: dtype that the model computes in.
        pads_values: whether values may have fewer elements than keys. The worker sets all three
            before it loads a model.
    """

    quota: ClassVar[Quota]
    computed: ClassVar[torch.dtype]
    pads_values: ClassVar[bool] = False
    supported_dtypes: ClassVar[list[torch.dtype]] = list(SUPPORTED_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        *stored.QUANTISED,
    ]

    @staticmethod
    def get_name() -> str:
        return "BUDGETKV"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return BudgetAttention

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return BudgetMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: AttentionSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(8)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(MIN_HEAD_SIZE, MAX_HEAD_SIZE + 1, 8))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # one buffer for all layers, so that any head of any layer may use any page of a block
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        # vLLM also passes specs that have been customized already
        if isinstance(spec, QuotaSpec):
            return spec
        return QuotaSpec.of(spec, cls.quota, cls.computed, pads_values=cls.pads_values)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


def layers_under_quota(
    specs: Mapping[str, KVCacheSpec], *, may_keep_state: bool, may_keep_windows: bool
) -> list[str]:
    """Names of the layers whose cache is ours; refuse those that keep another kind of cache.

    Args:
        specs: of all layers of the model.
        may_keep_state: whether layers may keep recurrent state, which stays vLLM's.
        may_keep_windows: whether layers may keep a window of keys and values, which stays vLLM's.

    Raises:
        ValueError: names the first such layer and what its cache is.
    """
    allowed = (MambaSpec,) * may_keep_state + WINDOWS * may_keep_windows
    for name, spec in specs.items():
        if not isinstance(spec, QuotaSpec) and type(spec) not in allowed:
            raise ValueError(
                f"layer {name} of the model has {', '.join(foreign_to(spec))}, which no quota "
                "covers: start without --kv-policy"
            )
    return [name for name, spec in specs.items() if isinstance(spec, QuotaSpec)]
