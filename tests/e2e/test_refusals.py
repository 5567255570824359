"""What cannot be served stops the start, with the reason and the option to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import vllm_budgetkv

vllm_budgetkv.register()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402  (after the plugin, as vLLM itself does)

from vllm_budgetkv.start import refusals, stored  # noqa: E402
from vllm_budgetkv.start.config import BudgetConfig  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

# vLLM lets a batch run as two with these kernels only
TWO_BATCHES = {"all2all_backend": "deepep_low_latency"}
QUOTA = {"policy": "hybrid", "page_quota": 64, "chunk_tokens": 256}


def create(model: Path, budget: dict[str, Any] | None = None, **engine: Any) -> Any:
    arguments = {"model": str(model), "max_model_len": 4096, "dtype": "float32", **engine}
    additional = {"budgetkv": QUOTA if budget is None else budget}
    return EngineArgs(additional_config=additional, **arguments).create_engine_config()


def test_a_good_configuration_names_our_classes(text_model: Path) -> None:
    config = create(text_model)
    assert config.scheduler_config.scheduler_cls.startswith("vllm_budgetkv.")
    assert config.parallel_config.worker_cls.startswith("vllm_budgetkv.")
    assert config.scheduler_config.long_prefill_token_threshold == 256
    assert config.cache_config.block_size == 16


def test_without_a_policy_the_configuration_is_stock(text_model: Path) -> None:
    config = EngineArgs(model=str(text_model), max_model_len=4096).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.long_prefill_token_threshold == 0


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            r"fp8_e5m2 is not supported: use fp8 or auto \(here float",
        ),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "stored alike: remove --kv-cache-dtype-skip-layers 0",
        ),
        ({"pipeline_parallel_size": 2, "enforce_eager": True}, "remove --enforce-eager"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding is not supported: remove --speculative-config",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "remove --kv-transfer-config",
        ),
        ({"enable_chunked_prefill": False}, "use --enable-chunked-prefill"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "would replace ours"),
        ({"worker_cls": "some.where.Worker"}, "--worker-cls some.where.Worker would replace ours"),
        ({"long_prefill_token_threshold": 100}, "contradicts --kv-chunk-tokens 256"),
        ({"long_prefill_token_threshold_adaptive": True}, "must not outgrow the quota"),
        ({"ubatch_size": 2, **TWO_BATCHES}, "remove --enable-dbo and --ubatch-size"),
        ({"kv_offloading_size": 1.0}, "KV offloading is not supported: remove --kv-offloading-s"),
        ({"prefix_match_unit": 8}, "a block of 16 tokens: remove --prefix-match-unit 8"),
        ({"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}}, "per_kind"),
        # vLLM 0.33 refuses it first
        (
            {"kv_cache_dtype": "bfloat16"},
            r"use fp8 or auto \(here float32\)|incompatible with dtype",
        ),
        ({"runner": "pooling"}, "keeps no growing cache: use --runner generate"),
        ({"num_gpu_blocks_override": 64}, "the pool has 64, of which vLLM reserves 1"),
        ({"disable_chunked_mm_input": True}, "remove --disable-chunked-mm-input"),
        ({"block_size": 48}, "a page of 48 tokens is not supported; set --block-size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_features(text_model: Path, engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(text_model, **engine)


@pytest.mark.parametrize(
    ("variable", "value"), [("VLLM_KV_CACHE_LAYOUT", "HND"), ("VLLM_BATCH_INVARIANT", "1")]
)
def test_refused_variables(
    text_model: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"unset {variable}"):
        create(text_model)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("parallel_config", "enable_dbo", True, "a batch must run as one: remove --enable-dbo"),
        ("parallel_config", "decode_context_parallel_size", 2, "set it to 1"),
        ("parallel_config", "prefill_context_parallel_size", 2, "set it to 1"),
        ("attention_config", "hisparse_config", object(), "remove hisparse_config"),
        ("cache_config", "kv_sharing_fast_prefill", True, "remove --kv-sharing-fast-prefill"),
        ("cache_config", "cache_dtype", "int4_per_token_head", "--kv-cache-dtype int4_per_token"),
    ],
)
def test_refused_features_of_other_machines(
    text_model: Path, part: str, field: str, value: Any, message: str
) -> None:
    """vLLM itself refuses them, or switches them off, on a machine without the right GPUs."""
    config = EngineArgs(model=str(text_model), dtype="float32").create_engine_config()
    refusals.check(config, BudgetConfig(**QUOTA))
    object.__setattr__(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=message):
        refusals.check(config, BudgetConfig(**QUOTA))


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
LLM_COMPRESSOR = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
LLM_COMPRESSOR |= {"config_groups": {}, "format": "dense", "ignore": []}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}


@pytest.mark.parametrize("quantization", [LLM_COMPRESSOR, MODELOPT], ids=["compressor", "modelopt"])
def test_a_checkpoint_says_how_it_is_stored(text_model: Path, quantization: dict[str, Any]) -> None:
    """`auto` follows the checkpoint; that of llm-compressor vLLM itself reads with a layer only."""
    overrides = {"hf_overrides": {"quantization_config": quantization}, "dtype": "bfloat16"}
    assert stored.is_quantised(create(text_model, **overrides))
    assert not stored.is_quantised(create(text_model, **overrides, kv_cache_dtype="bfloat16"))
    with pytest.raises(ValueError, match="fp8_e5m2 is not supported: use auto, as the checkpoint"):
        create(text_model, **overrides, kv_cache_dtype="fp8_e5m2")


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [({"num_bits": 4}, "float of 4 bits"), ({"type": "int"}, "int of 8 bits")],
    ids=["4-bit", "int"],
)
def test_other_kinds_of_a_checkpoint(text_model: Path, scheme: dict[str, Any], kind: str) -> None:
    quantization = LLM_COMPRESSOR | {"kv_cache_scheme": SCHEME | scheme}
    overrides = {"hf_overrides": {"quantization_config": quantization}, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=f"stores keys and values as {kind}, which vLLM does not"):
        create(text_model, **overrides)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("bfloat16", "bfloat16$"), ("float32", "bfloat16 and --dtype bfloat16$")],
)
def test_a_scale_for_every_head(text_model: Path, dtype: str, advice: str) -> None:
    scheme = {"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}}
    overrides = {"hf_overrides": {"quantization_config": LLM_COMPRESSOR | scheme}, "dtype": dtype}
    with pytest.raises(ValueError, match=f"by attn_head, but .* use --kv-cache-dtype {advice}"):
        create(text_model, **overrides)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"video_pruning_rate": 0.5}, "prunes no video on a CPU: remove --video-pruning-rate 0.5"),
        ({"mm_encoder_only": True}, "keeps no cache: remove --mm-encoder-only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_media(vision_model: Path, engine: dict[str, Any], message: str) -> None:
    create(vision_model, **{name: type(value)() for name, value in engine.items()})
    with pytest.raises(ValueError, match=message):
        create(vision_model, **engine)


def test_a_model_shorter_than_a_chunk_starts(text_model: Path) -> None:
    """vLLM said that a threshold nobody had set was too long."""
    config = create(text_model, {"policy": "hybrid", "page_quota": 24}, max_model_len=512)
    assert config.scheduler_config.long_prefill_token_threshold == 512


def test_a_quota_that_holds_the_longest_request_starts(text_model: Path) -> None:
    """It was cut to the length, then refused as too small, with the advice to raise it."""
    create(text_model, {"policy": "hybrid", "page_quota": 64}, max_model_len=128)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"policy": "hybird", "page_quota": 9}, "unknown --kv-policy 'hybird'"),
        ({"policy": "hybrid", "page_quota": -1}, "at least 1; got -1"),
        ({"policy": "hybrid", "page_quota": "x"}, "whole number"),
        ({"policy": "hybrid", "page_quota": 9, "colour": 1}, "unknown budgetkv option"),
        (
            {"policy": "hybrid", "page_quota": 9},
            "too small for chunks of 1024 tokens over 2 layers",
        ),
        (QUOTA | {"tuning": {"dynamic_unit_tokens": 12}}, "divisor of the page of 16 tokens"),
    ],
    ids=["unknown-policy", "negative", "not-a-number", "unknown-option", "too-small", "unit"],
)
def test_refused_options(text_model: Path, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(text_model, budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"report_file": "missing/r.jsonl"}, r"--kv-report-file .*missing/r.jsonl cannot be wri"),
        ({"report_file": "."}, "cannot be written .*: name a file in a directory that exists"),
        ({"head_scores_file": "missing.json"}, "--kv-head-scores-file .* cannot be read as JSON"),
        ({"head_scores_file": "list.json"}, "--kv-head-scores-file .* must hold a JSON list"),
        ({"head_scores_file": "one.json"}, "has 1 layers of 2 KV heads, but this worker has 2 of"),
    ],
    ids=["no-directory", "a-directory", "no-scores", "no-table", "another-model"],
)
def test_refused_files(
    tmp_path: Path, text_model: Path, budget: dict[str, Any], message: str
) -> None:
    """The report's ended the engine with its first request; the scores' the worker, unexplained."""
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "one.json").write_text("[[1, 2]]", encoding="utf-8")
    files = {name: str(tmp_path / file) for name, file in budget.items()}
    policy = "sparsemm" if "head_scores_file" in files else "hybrid"
    with pytest.raises(ValueError, match=message):
        create(text_model, QUOTA | files | {"policy": policy})


def test_a_report_file_that_can_be_written_is_there_from_the_start(
    tmp_path: Path, text_model: Path
) -> None:
    file = tmp_path / "report.jsonl"
    file.write_text("earlier\n", encoding="utf-8")
    for name in (file, tmp_path / "new.jsonl"):
        create(text_model, QUOTA | {"report_file": str(name)})
    assert file.read_text(encoding="utf-8") == "earlier\n"


def test_the_smallest_quota_that_is_named_works(text_model: Path) -> None:
    with pytest.raises(ValueError, match="too small") as error:
        create(text_model, {"policy": "window", "page_quota": 1})
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    create(text_model, {"policy": "window", "page_quota": smallest})
