"""The metadata builder: rows of vLLM's batch become slots of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_budgetkv.worker.step import Step

if TYPE_CHECKING:
    from vllm_budgetkv.worker.cache import BudgetCache

RowIds = Callable[[CommonAttentionMetadata], Sequence[str]]


class BudgetMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Builds the `Step` of a batch once the worker has bound it to its cache.

    Before, vLLM captures graphs over a small cache to see what memory they take. Their layers get
    no step, so they write zeros; ours would allocate nothing in a graph either.
    """

    # decode rows stand first, so that page selection serves one contiguous run of rows
    reorder_batch_threshold: ClassVar[int] = 1
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache: BudgetCache | None = None
        self._row_ids: RowIds | None = None

    def bind(self, cache: BudgetCache, row_ids: RowIds) -> None:
        """Say which cache this builder serves and which request each row belongs to."""
        self._cache = cache
        self._row_ids = row_ids

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step | None:
        if self._cache is None or self._row_ids is None or not self._cache.plans:
            # a dummy batch holds no request; `BudgetCache.end_step` refuses a real one without step
            return None
        query_start = common_attn_metadata.query_start_loc_cpu
        row_ids = self._row_ids(common_attn_metadata)
        return self._cache.open_step(row_ids, query_start[: len(row_ids) + 1])

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> Step | None:
        """The decode step that a graph of so many rows replays."""
        if self._cache is None:
            return None
        return self._cache.step_to_capture(common_attn_metadata.num_reqs)
