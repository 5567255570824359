"""Every field through which vLLM can ask a layer for other mathematics is served or refused.

The lists are vLLM's fields, one by one. A vLLM with another field fails here first.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.worker import metadata as builder
from vllm_budgetkv.worker.attention import BudgetAttention
from vllm_budgetkv.worker.backend import BudgetBackend
from vllm_budgetkv.worker.metadata import BudgetMetadataBuilder


@dataclass(frozen=True)
class Served:
    """The field changes nothing, or we do what it asks; `why` says which."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A layer or batch with `value` in the field is refused with `message`."""

    value: Any
    message: str


SPEC: dict[str, Served | Refused] = {
    "block_size": Served("tokens of a page"),
    "num_kv_heads": Served("heads of a block"),
    "head_size": Served("elements of a key"),
    "dtype": Served("of keys, values and digests"),
    "dcp_sharded": Served("decode context parallelism is refused at start"),
    "max_tp_shards": Served("counts replicas of heads for connectors, which are refused at start"),
    "head_size_v": Refused(64, "values of 64 elements, other than its keys"),
    "kv_quant_mode": Refused(KVQuantMode.INT8_PER_TOKEN_HEAD, "a quantised cache"),
    "page_size_padded": Refused(1 << 16, "page_size_padded 65536"),
    "num_head_slots": Refused(1, "num_head_slots 1"),
    "state_content_bytes": Refused(128, "state_content_bytes 128"),
    "tokens_per_state": Refused(4, "tokens_per_state 4"),
    "block_stride_alignment": Refused(256, "block_stride_alignment 256"),
    "sliding_window": Refused(128, "a sliding window of 128 tokens"),
    "attention_chunk_size": Refused(64, "attention in chunks of 64 tokens"),
    "non_causal": Refused(True, "tokens that attend to later ones"),
    "is_draft": Refused(True, "is_draft True"),
}
# than 0.32
IN_NEWER_VERSIONS = {"is_draft"}

IMPLEMENTATION: dict[str, Served | Refused] = {
    "num_heads": Served("query heads"),
    "head_size": Served("elements of a key"),
    "scale": Served("of the logits"),
    "num_kv_heads": Served("heads of a block"),
    "kv_cache_dtype": Served("8-bit floats; other kinds are refused at start and by the spec"),
    "alibi_slopes": Refused([0.5], "ALiBi"),
    "sliding_window": Refused(128, "a sliding window"),
    "logits_soft_cap": Served("of the logits, `Softmax.soft_cap`"),
    "attn_type": Refused(AttentionType.ENCODER_ONLY, "encoder_only attention"),
    "kv_sharing_target_layer_name": Refused("model.layers.0.attn", "layers that share their cache"),
}

# beyond those that go to the implementation as they are
LAYER: dict[str, str] = {
    "use_alibi_sqrt": "vLLM refuses it: the backend does not say that it supports it",
    "cache_config": "checked at start",
    "quant_config": "units of keys and values; a checkpoint with several a layer is refused",
    "per_layer_sliding_window": "`sliding_window` of the implementation",
    "prefix": "name of the layer",
    "mm_prefix_clamp_sliding_window": "of Gemma 4 and DeepSeek V4, which are refused at start",
    "attn_backend": "wraps ours; what it changes is in the layer's spec or in the batch; what "
    "`padded_values` takes away is another's",
    "head_size_v": "in the layer's spec",
    "extra_impl_args": "refused by the implementation, whatever they are",
}

ONE = torch.ones(1, dtype=torch.int32)
METADATA: dict[str, Served | Refused] = {
    "query_start_loc": Served("rows of the batch; we read the host's copy"),
    "query_start_loc_cpu": Served("rows of the batch"),
    "seq_lens": Served("tables know how long heads are"),
    "num_reqs": Served("rows of the batch"),
    "num_actual_tokens": Served("the rows say it"),
    "max_query_len": Served("the rows say it"),
    "max_seq_len": Served("tables know how long heads are"),
    "block_table_tensor": Served("tables of ours are used"),
    "slot_mapping": Served("tables of ours are used"),
    "positions": Served("read from the model's arguments"),
    "is_prefilling": Served("plans say it"),
    "seq_lens_cpu_upper_bound": Served("tables know how long heads are"),
    "req_idx": Served("which request a row is"),
    "mm_req_doc_ranges": Served("pictures whose tokens attend both ways"),
    "rswa_prefix_lens": Served("runner V2 always fills it; such a window is refused at start"),
    "_num_computed_tokens_cache": Served("vLLM's own"),
    "_token_to_req_indices_cache": Served("vLLM's own"),
    "causal": Refused(False, "'causal': False"),
    "logits_indices_padded": Refused(ONE, "'logits_indices_padded'"),
    "num_logits_indices": Refused(1, "'num_logits_indices'"),
    "max_logits_per_req": Refused(1, "'max_logits_per_req'"),
    "encoder_seq_lens": Refused(ONE, "'encoder_seq_lens'"),
    "encoder_seq_lens_cpu": Refused(ONE.numpy(), "'encoder_seq_lens_cpu'"),
    "dcp_local_seq_lens": Refused(ONE, "'dcp_local_seq_lens'"),
    "dcp_local_seq_lens_cpu_upper_bound": Refused(ONE, "'dcp_local_seq_lens_cpu_upper_bound'"),
    "replayssm_decode_base_cpu": Refused(ONE, "'replayssm_decode_base_cpu'"),
}


def parameters_of(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def names_of(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def refused(verdicts: dict[str, Served | Refused]) -> list[Any]:
    found = [(name, v) for name, v in verdicts.items() if isinstance(v, Refused)]
    return [pytest.param(name, v.value, v.message, id=name) for name, v in found]


@pytest.mark.parametrize(
    ("owner", "found", "listed"),
    [
        ("FullAttentionSpec", names_of(FullAttentionSpec), set(SPEC)),
        ("AttentionImpl", parameters_of(AttentionImpl), set(IMPLEMENTATION)),
        (
            "Attention",
            parameters_of(Attention) - set(IMPLEMENTATION) | {"extra_impl_args"},
            set(LAYER),
        ),
        ("CommonAttentionMetadata", names_of(CommonAttentionMetadata), set(METADATA)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_has_a_verdict(owner: str, found: set[str], listed: set[str]) -> None:
    assert not found - listed, (
        f"vLLM {vllm.__version__} has fields of {owner} that nobody has judged: does a layer or "
        "batch compute something else with them? If so, serve it or let it be refused; then say "
        "which in this file. Until then any value but the default is refused."
    )
    assert not listed - found - IN_NEWER_VERSIONS, (
        f"{owner} lost fields: take them from this file and from the code"
    )


QUOTA = Quota(blocks=64, page_tokens=16, num_layers=2, chunk_tokens=64, decode_interval_tokens=16)


def plain() -> FullAttentionSpec:
    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)


@pytest.mark.parametrize(("name", "value", "message"), refused(SPEC))
def test_refused_specs(name: str, value: Any, message: str) -> None:
    if name not in names_of(FullAttentionSpec):
        pytest.skip(f"vLLM {vllm.__version__} has no such field")
    with pytest.raises(ValueError, match=message):
        QuotaSpec.of(replace(plain(), **{name: value}), QUOTA)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 32},
        {"num_kv_heads": 8},
        {"head_size": 64, "head_size_v": 64},
        {"dtype": torch.bfloat16},
        {"dcp_sharded": False},
        {"max_tp_shards": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_served_specs(changes: dict[str, Any]) -> None:
    quota = replace(QUOTA, page_tokens=changes.get("block_size", QUOTA.page_tokens))
    spec = QuotaSpec.of(replace(plain(), **changes), quota)
    assert {name: getattr(spec, name) for name in changes} == changes


def test_values_of_fewer_elements_are_padded() -> None:
    """Of models that were tried with them: the bytes of a page are those of keys twice."""
    narrow = replace(plain(), head_size_v=16)
    with pytest.raises(ValueError, match="values of 16 elements, other than its keys"):
        QuotaSpec.of(narrow, QUOTA)
    assert QuotaSpec.of(narrow, QUOTA, pads_values=True) == QuotaSpec.of(plain(), QUOTA)
    with pytest.raises(ValueError, match="values of 64 elements, other than its keys"):
        QuotaSpec.of(replace(plain(), head_size_v=64), QUOTA, pads_values=True)


def implementation(**arguments: Any) -> BudgetAttention:
    return BudgetAttention(**{"num_heads": 4, "head_size": 32, "scale": 0.2, **arguments})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *refused(IMPLEMENTATION),
        ("dual_chunk_attention_config", {"chunk_size": 64}, "dual chunk attention"),
        ("rotates_values", True, "attention with rotates_values"),
    ],
)
def test_refused_implementations(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the model uses .*{message}.* start without --kv-policy"):
        implementation(**{name: value})


def test_a_plain_implementation_is_served() -> None:
    plain = implementation(num_kv_heads=2, sinks=None, logits_soft_cap=None)
    assert (plain.num_kv_heads, plain.soft_cap, plain.sinks) == (2, 0.0, None)
    special = implementation(num_kv_heads=2, sinks=ONE, logits_soft_cap=50.0)
    assert special.soft_cap == 50.0 and special.sinks is ONE


def test_vllm_refuses_what_the_backend_does_not_claim() -> None:
    assert not BudgetBackend.supports_alibi_sqrt()
    assert not BudgetBackend.supports_non_causal()
    assert not BudgetBackend.supports_rswa()


def batch(**changes: Any) -> CommonAttentionMetadata:
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([3, 9], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=4,
        max_query_len=3,
        max_seq_len=9,
        block_table_tensor=torch.zeros(2, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(4, dtype=torch.int64),
    )
    return replace(common, **changes)


def bound(plans: tuple[str, ...] = ("a", "b"), rows: tuple[str, ...] = ("a", "b")) -> Any:
    """A builder whose cache runs `plans` and whose rows are `rows`, and its layer's part."""
    layer = SimpleNamespace(impl=implementation())
    config = SimpleNamespace(static_forward_context={"attn": layer})
    found = BudgetMetadataBuilder(
        plain(), ["attn"], SimpleNamespace(compilation_config=config), torch.device("cpu")
    )
    # a step is the name of what was asked for
    layer.impl.cache = SimpleNamespace(
        plans=dict.fromkeys(plans),
        has_chunks=True,
        open_step=lambda rows, starts, pictures: (*rows, starts.tolist(), pictures),
        step_to_capture=lambda num_rows: num_rows,
    )
    found.bind(layer.impl.cache, lambda common: rows)
    return found


@pytest.mark.parametrize(("name", "value", "message"), refused(METADATA))
def test_refused_batches(name: str, value: Any, message: str) -> None:
    for ask in (lambda b, c: b.build(0, c), lambda b, c: b.build_for_cudagraph_capture(c)):
        with pytest.raises(RuntimeError, match=message):
            ask(bound(), batch(**{name: value}))


def test_a_plain_batch_is_served() -> None:
    served = {n: ONE for n, v in METADATA.items() if isinstance(v, Served) and n in DEFAULTED}
    assert bound().build(0, batch(**served)) == ("a", "b", [0, 3, 4], {})
    assert bound().build_for_cudagraph_capture(batch()) == 2


def test_a_picture_reaches_the_step_with_the_token_behind_its_last() -> None:
    pictures = {0: [(1, 2), (4, 4)], 1: []}
    step = bound().build(0, batch(mm_req_doc_ranges=pictures))
    assert step == ("a", "b", [0, 3, 4], {0: [(1, 3), (4, 5)], 1: []})


def test_in_a_decode_step_nobody_looks_at_pictures() -> None:
    found = bound()
    found._cache.has_chunks = False
    step = found.build(0, batch(mm_req_doc_ranges={0: [(1, 2)]}))
    assert step == ("a", "b", [0, 3, 4], {})


DEFAULTED = {"positions", "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx"} | {
    "rswa_prefix_lens"
}


def test_fields_that_may_be_set_are_those_with_a_verdict() -> None:
    served = {name for name, v in METADATA.items() if isinstance(v, Served)}
    assert builder.FREE_FIELDS - {"causal"} <= served
    assert set(builder.UNSET_FIELDS) == set(METADATA) - served - {"causal"}
