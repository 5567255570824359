"""What `plan` counts, against the same numbers worked out by hand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cli.engine import read_arguments
from vllm_budgetkv.cli.main import main
from vllm_budgetkv.start.config import SECTION
from vllm_budgetkv.testing import mimo_v2
from vllm_budgetkv.testing.recurrent import build_qwen3_5
from vllm_budgetkv.testing.sliding import build_gemma3

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import RunPlan

MODELS = Path(__file__).parents[2] / "build" / "models"

# Qwen2.5-VL-7B: 28 layers, 4 KV heads of 128, bfloat16
HEADS = 28 * 4
STOCK_TOKEN_BYTES = 2 * HEADS * 128 * 2
PAGE_BYTES = PageLayout(16, 128, torch.bfloat16).page_bytes
BLOCK_BYTES = HEADS * PAGE_BYTES
GIB = 1 << 30
POOL = ("--kv-cache-memory-bytes", str(40 * GIB))
LONG = ("--tokens", "100000")


def test_a_given_quota(seven_b: Path, plan_of: RunPlan) -> None:
    arguments = ("--kv-page-quota", "600", *LONG, "--concurrency", "8", *POOL)
    plan = plan_of("--model", str(seven_b), *arguments)
    quota = Quota(
        blocks=600, page_tokens=16, num_layers=28, chunk_tokens=1024, decode_interval_tokens=64
    )
    assert plan["quota"]["blocks"] == 600 and not plan["quota"]["is_suggested"]
    assert plan["quota"]["budget_tokens"] == plan["quota"]["kept_tokens"] == quota.budget_tokens
    assert plan["quota"]["min_blocks"] == quota.min_blocks
    assert plan["under_quota"] == {
        "block_bytes": BLOCK_BYTES,
        "token_bytes": BLOCK_BYTES // 16,
        "blocks": 600,
        "bytes": 600 * BLOCK_BYTES,
        "pool_blocks": 40 * GIB // BLOCK_BYTES,
        "requests_at_once": (40 * GIB // BLOCK_BYTES - 1) // 600,
    }
    stock_blocks = 40 * GIB // (16 * STOCK_TOKEN_BYTES)
    assert plan["full_cache"] == {
        "block_bytes": 16 * STOCK_TOKEN_BYTES,
        "token_bytes": STOCK_TOKEN_BYTES,
        "blocks": 6250,
        "bytes": 6250 * 16 * STOCK_TOKEN_BYTES,
        "pool_blocks": stock_blocks,
        "requests_at_once": (stock_blocks - 1) // 6250,
    }


def test_the_suggested_quota_is_the_largest_that_lets_all_run(
    seven_b: Path, plan_of: RunPlan
) -> None:
    model = ("--model", str(seven_b), *LONG, *POOL, "--concurrency", "16")
    plan = plan_of(*model)
    blocks = plan["quota"]["blocks"]
    assert plan["quota"]["is_suggested"] and plan["quota"]["is_needed"]
    assert plan["under_quota"]["requests_at_once"] == 16
    assert plan["full_cache"]["requests_at_once"] < 16
    larger = plan_of(*model, "--kv-page-quota", str(blocks + 1))
    assert larger["under_quota"]["requests_at_once"] == 15


def test_no_quota_where_a_full_cache_holds_all(seven_b: Path, plan_of: RunPlan) -> None:
    plan = plan_of("--model", str(seven_b), *LONG, *POOL, "--concurrency", "7")
    assert not plan["quota"]["is_needed"]
    assert plan["full_cache"]["requests_at_once"] == 7
    assert "--kv-policy" not in plan["serve"]


@pytest.mark.parametrize(
    ("flags", "blocks"),
    [
        (("--kv-page-quota", "64"), 64),
        (("--kv-quota-tokens", "1000"), 62),
        (("--kv-quota-ratio", "0.1"), 625),
        (("--kv-quota-ratio", "0.1", "--block-size", "32"), 312),
        # --max-model-len, not --tokens, is what a ratio is a share of
        (("--kv-quota-ratio", "0.1", "--max-model-len", "120000"), 750),
        # no request holds more than the longest needs
        (("--kv-page-quota", "9999"), 6250),
    ],
)
def test_quotas_mean_what_they_mean_to_the_server(
    seven_b: Path, plan_of: RunPlan, flags: tuple[str, ...], blocks: int
) -> None:
    assert plan_of("--model", str(seven_b), *LONG, *flags)["quota"]["blocks"] == blocks


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (LONG, "nothing tells how large a quota may be: say --gpu-memory 80GiB"),
        (("--tokens", "0"), "--tokens must be at least 1; got 0"),
        (("--concurrency", "0"), "--concurrency must be at least 1; got 0"),
        (("--gpu-memory", "80"), "--gpu-memory must be a size as 512MiB or 32GiB; got '80'"),
        (("--tokens", "900000"), r"--tokens 900000 is more than vLLM serves: User-specified"),
        (
            (*LONG, "--max-model-len", "50000"),
            "--tokens 100000 is more than --max-model-len 50000 allows",
        ),
        ((*LONG, "--kv-page-quota", "4"), r"a quota of 4 blocks .* at least 10 blocks"),
        (
            (*LONG, "--kv-page-quota", "9", "--kv-quota-ratio", "0.1"),
            "needs exactly one of --kv-page-quota, .*; got 2",
        ),
        ((*LONG, "--kv-page-quota", "64", "--kv-probe-tokens", "0"), "--kv-probe-tokens must be"),
        (
            (*LONG, *POOL, "--concurrency", "9000"),
            r"pool of \d+,\d+ blocks leaves 4 .* lower --concurrency to at most \d+",
        ),
        (
            (*LONG, "--kv-page-quota", "600", "--kv-cache-memory-bytes", str(GIB // 4)),
            "set --kv-page-quota to at most 266, .* raise --kv-cache-memory-bytes",
        ),
        (
            (*LONG, "--kv-page-quota", "600", "--max-num-batched-tokens", "900"),
            "--max-num-batched-tokens 900 has no room for a chunk of 1024",
        ),
        ((*LONG, "--kv-page-quota", "60", "--block-size", "24"), "set --block-size to one of"),
        (
            (*LONG, "--kv-page-quota", "60", "--pipeline-parallel-size", "2"),
            "no plan counts the stages of --pipeline-parallel-size yet: start the server",
        ),
        (
            (*LONG, "--kv-page-quota", "60", "--kv-host-memory", "1KiB"),
            "--kv-host-memory 1KiB keeps no block of 16 tokens",
        ),
        (
            (*LONG, "--gpu-memory", "20GiB"),
            "nothing is left for the KV cache: .* bound the tower with --limit-mm-per-prompt",
        ),
    ],
)
def test_refusals(seven_b: Path, plan_of: RunPlan, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        plan_of("--model", str(seven_b), *arguments)
    assert str(refusal.value).startswith("vllm-budgetkv plan: ")
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize(
    ("build", "kept"), [(build_qwen3_5, "recurrent state"), (build_gemma3, "windows")]
)
def test_layers_of_other_kinds_are_not_planned(
    plan_of: RunPlan, build: Callable[[Path], Path], kept: str
) -> None:
    """A server with such a model starts; what those layers take is told there."""
    with pytest.raises(ValueError, match=f"no plan counts {kept} yet: start the server"):
        plan_of("--model", str(build(MODELS)))


@pytest.mark.usefixtures("environment")
def test_an_unknown_flag_is_told_by_vllm(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", str(seven_b), "--kv-page-quotas", "8"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --kv-page-quotas 8" in capsys.readouterr().err


def test_a_folder_that_is_not_there(plan_of: RunPlan) -> None:
    with pytest.raises(ValueError, match="/nowhere/model"):
        plan_of("--model", "/nowhere/model", "--kv-page-quota", "64")


def test_host_memory(seven_b: Path, plan_of: RunPlan) -> None:
    host = ("--kv-host-memory", "64GiB", "--kv-quota-ratio", "0.1")
    found = plan_of("--model", str(seven_b), *LONG, *host)["host_memory"]
    assert found["blocks"] == 64 * GIB // (16 * STOCK_TOKEN_BYTES)
    assert found["request_bytes"] == 100_000 * STOCK_TOKEN_BYTES
    assert found["at_once"] == found["blocks"] // 6250
    assert found["room"]["index_pages"] > 0
    small = ("--kv-host-memory", "64GiB", "--kv-page-quota", "12")
    assert plan_of("--model", str(seven_b), *LONG, *small)["host_memory"]["room"] is None


def test_keys_and_values_of_8_bits(seven_b: Path, plan_of: RunPlan) -> None:
    stored = ("--kv-cache-dtype", "fp8", "--kv-host-memory", "4GiB", "--kv-page-quota", "600")
    plan = plan_of("--model", str(seven_b), *stored, *LONG, *POOL)
    page_bytes = PageLayout(16, 128, torch.bfloat16, is_quantised=True).page_bytes
    assert plan["under_quota"]["block_bytes"] == HEADS * page_bytes < 0.55 * BLOCK_BYTES
    assert plan["full_cache"]["token_bytes"] == STOCK_TOKEN_BYTES // 2
    assert plan["host_memory"]["blocks"] == 4 * GIB // (16 * STOCK_TOKEN_BYTES // 2)
    assert "--kv-cache-dtype fp8" in plan["serve"]


@pytest.mark.usefixtures("environment")
def test_values_smaller_than_keys(plan_of: RunPlan, capsys: pytest.CaptureFixture[str]) -> None:
    """A full cache has room for values as they are, a quota for values as wide as keys."""
    arguments = ("--model", str(mimo_v2.build_full(MODELS)), "--kv-page-quota", "64", *POOL)
    heads, elements = 3 * 2, mimo_v2.HEAD_SIZE + mimo_v2.HEAD_SIZE_V
    plan = plan_of(*arguments)
    page_bytes = PageLayout(16, mimo_v2.HEAD_SIZE, torch.bfloat16).page_bytes
    assert plan["full_cache"]["token_bytes"] == heads * elements * 2
    assert plan["under_quota"]["block_bytes"] == heads * page_bytes
    assert main(["plan", *arguments]) == 0
    page = words_of(capsys.readouterr().out)
    assert "2 KV heads of 96 with values of 64, bfloat16" in page
    assert "Under a quota values take as much room as keys, which are longer." in page


def test_two_gpus_share_the_heads(seven_b: Path, plan_of: RunPlan) -> None:
    arguments = ("--model", str(seven_b), *LONG, "--kv-page-quota", "64")
    one, two = plan_of(*arguments), plan_of(*arguments, "--tensor-parallel-size", "2")
    assert two["model"]["num_kv_heads"] == 2
    assert 2 * two["under_quota"]["bytes"] == one["under_quota"]["bytes"]


LINES = [
    ("--gpu-memory", "80GiB", *LONG, "--concurrency", "16"),
    ("--gpu-memory", "80GiB", *LONG, "--concurrency", "16", "--skip-mm-profiling"),
    (*LONG, "--kv-quota-ratio", "0.1", "--kv-chunk-tokens", "512", "--dtype", "float16"),
    (*LONG, "--kv-page-quota", "70", "--limit-mm-per-prompt", '{"image": 4, "video": 0}'),
    (*LONG, *POOL, "--kv-policy", "window", "--concurrency", "9"),
]


@pytest.mark.parametrize("arguments", LINES, ids=range(len(LINES)))
def test_the_line_starts_what_was_planned(
    seven_b: Path, plan_of: RunPlan, arguments: tuple[str, ...]
) -> None:
    """vLLM's parser reads the pasted line, and the plan of its arguments is the same plan."""
    plan = plan_of("--model", str(seven_b), *arguments)
    words = shlex.split(plan["serve"].replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", str(seven_b)]
    given = read_arguments(["--model", str(seven_b), *words[3:]])
    assert given.max_model_len == 100_000
    assert given.max_num_seqs == plan["concurrency"]
    assert given.additional_config[SECTION]["policy"] == plan["quota"]["policy"]
    again = plan_of("--model", str(seven_b), *LONG, *words[3:])
    assert again["quota"]["blocks"] == plan["quota"]["blocks"]
    assert again["under_quota"]["bytes"] == plan["under_quota"]["bytes"]
    if plan["pool"] is None or "--kv-cache-memory-bytes" in words:
        assert again["under_quota"] == plan["under_quota"]


def test_a_gpu_needs_its_flag(seven_b: Path, plan_of: RunPlan) -> None:
    arguments = ("--model", str(seven_b), *LONG, "--kv-page-quota", "64")
    assert "--kv-unproven-device" not in plan_of(*arguments)["serve"]
    on_gpu = plan_of(*arguments, "--gpu-memory", "80GiB")["serve"]
    assert on_gpu.count("--kv-unproven-device") == 1
    given = plan_of(*arguments, "--gpu-memory", "80GiB", "--kv-unproven-device")["serve"]
    assert given.count("--kv-unproven-device") == 1


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("columns", [80, 140])
def test_the_page_fits_a_terminal(
    seven_b: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = ["--gpu-memory", "80GiB", *LONG, "--concurrency", "16"]
    assert main(["plan", "--model", str(seven_b), *arguments]) == 0
    page = capsys.readouterr().out
    for title in ("One request of 100,000 tokens", "Memory of each GPU", "Pictures and videos"):
        assert title in page
    before, line, after = re.split(r"(?ms)^(vllm serve .*?[^\\])$\n", page)
    assert all(len(text) <= columns for text in (before + after).splitlines())
    assert "--kv-page-quota" in line
    assert page.count("estimate, see below") == 4
    assert page.count("- Estimate of ") == 3


def words_of(page: Any) -> str:
    return " ".join(str(page).split())


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kv-page-quota", "40"), "Answers were measured where 5 % of the tokens stay or more"),
        (("--kv-page-quota", "9999"), "none: the quota holds all 100,000 tokens"),
        (
            ("--kv-page-quota", "640"),
            "1 at once need 612.5 MiB of KV cache, 5.34 GiB if it is full",
        ),
        (
            ("--kv-page-quota", "6000", *POOL, "--concurrency", "9"),
            "7 at once, 7 in a full cache; you want 9: the others wait, or lower the quota",
        ),
        (("--kv-policy", "full"), "Quota none: full has none"),
        (POOL, "none is needed: a full cache holds 7 such requests at once"),
        (
            ("--gpu-memory", "80GiB", "--skip-mm-profiling", "--concurrency", "20"),
            "With --skip-mm-profiling vLLM leaves no memory for the vision tower",
        ),
        (
            ("--kv-page-quota", "12", "--kv-host-memory", "8GiB"),
            "Such a request is served without recall",
        ),
    ],
)
def test_what_the_page_says(
    seven_b: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert main(["plan", "--model", str(seven_b), *LONG, *arguments]) == 0
    assert told in words_of(capsys.readouterr().out)
