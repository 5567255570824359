"""The metadata builder: rows of vLLM's batch become slots of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_budgetkv.cache.step import Step

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.cache.cache import BudgetCache

RowIds = Callable[[CommonAttentionMetadata], Sequence[str]]


# fields of a batch that leave the mathematics alone, or whose mathematics is ours; any other that
# has a default must have it
FREE_FIELDS = {
    "causal",
    # tokens of pictures that see each other: served
    "mm_req_doc_ranges",
    "positions",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
    # Model Runner V2 fills it for every model; one with that window is refused at start
    "rswa_prefix_lens",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
}
UNSET_FIELDS = tuple(
    field.name
    for field in fields(CommonAttentionMetadata)
    if field.default is not MISSING and field.name not in FREE_FIELDS
)


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
        cache = self._bound_cache()
        if cache is None or self._row_ids is None or not cache.plans:
            # a dummy batch holds no request; a layer refuses a real one without step
            return None
        require_plain(common_attn_metadata)
        query_start = common_attn_metadata.query_start_loc_cpu
        row_ids = self._row_ids(common_attn_metadata)
        if len(row_ids) != len(cache.plans):
            raise RuntimeError(
                f"vLLM asked for {len(row_ids)} rows of a batch of {len(cache.plans)} requests, "
                "which must run as one: start without --kv-policy"
            )
        # vLLM names those of prompts that are behind a request, too
        pictures = pictures_of(common_attn_metadata) if cache.has_chunks else {}
        return cache.open_step(row_ids, query_start[: len(row_ids) + 1], pictures)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> Step | None:
        """The decode step that a graph of so many rows replays."""
        cache = self._bound_cache()
        if cache is None:
            return None
        require_plain(common_attn_metadata)
        return cache.step_to_capture(common_attn_metadata.num_reqs)

    def _bound_cache(self) -> BudgetCache | None:
        """The cache, or None while no layer has one either.

        Raises:
            RuntimeError: the worker has given its layers a cache, but it never saw this builder.
        """
        if self._cache is None:
            layers = self.vllm_config.compilation_config.static_forward_context
            if any(layers[name].impl.cache is not None for name in self.layer_names):
                raise RuntimeError(
                    "vLLM prepares a batch with a second metadata builder, which knows no "
                    "requests: start without --kv-policy"
                )
        return self._cache


def pictures_of(common: CommonAttentionMetadata) -> dict[int, list[Range]]:
    """Pictures of each row whose tokens attend both ways: the first, and the one behind the last.

    vLLM names the last.
    """
    found = common.mm_req_doc_ranges or {}
    return {row: [(first, last + 1) for first, last in each] for row, each in found.items()}


def require_plain(common: CommonAttentionMetadata) -> None:
    """Refuse a batch whose tokens attend to anything but all before them and their own picture.

    Raises:
        RuntimeError: names the field of vLLM's metadata and its value.
    """
    asked = {} if common.causal is True else {"causal": common.causal}
    for name in UNSET_FIELDS:
        value = getattr(common, name)
        if value is not None and not (isinstance(value, dict) and not value):
            asked[name] = value
    if asked:
        raise RuntimeError(
            f"vLLM asks for attention with {asked}, which a KV quota does not support: start "
            "without --kv-policy"
        )
