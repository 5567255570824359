"""Options: every bad value is refused with the flag to change, and flags keep their contract."""

from __future__ import annotations

import argparse

import pytest

from vllm_budgetkv import budget_args
from vllm_budgetkv.policy import POLICIES, PolicyOptions
from vllm_budgetkv.policy.window import WindowPolicy
from vllm_budgetkv.start.cli import add_flags, fold_flags
from vllm_budgetkv.start.config import BudgetConfig

FLAGS = {
    "--kv-policy", "--kv-page-quota", "--kv-quota-tokens", "--kv-quota-ratio", "--kv-chunk-tokens",
    "--kv-max-page-quota", "--kv-request-policies",
    "--kv-decode-interval-tokens", "--kv-lookahead", "--no-kv-lookahead",
    "--kv-lookahead-tokens",
    "--kv-lookahead-source", "--kv-template-tokens", "--kv-probe-tokens", "--kv-head-scores-file",
    "--kv-sink-tokens", "--kv-window-tokens", "--kv-static-threshold", "--kv-retrieval-ratio",
    "--kv-force-class", "--kv-merge", "--kv-recall-prefill", "--kv-tuning",
    "--kv-host-memory", "--kv-reuse",
    "--no-kv-reuse", "--kv-report-file", "--kv-trace-file",
    "--kv-answer-report", "--no-kv-answer-report",
    "--kv-unproven-device", "--no-kv-unproven-device", "--kv-check-ledger",
    "--no-kv-check-ledger",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser


def parse(*words: str, additional: dict[str, object] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(words)
    args.additional_config = additional
    fold_flags(args)
    return args


def test_flags_are_a_contract() -> None:
    assert set(make_parser()._option_string_actions) - {"-h", "--help"} == FLAGS


def test_every_flag_explains_itself() -> None:
    for action in make_parser()._actions:
        assert action.help and len(action.help) > 20, action.option_strings


def test_adding_flags_twice_leaves_the_parser_alone() -> None:
    parser = make_parser()
    add_flags(parser)
    assert parser.parse_args(["--kv-page-quota", "5"]).budgetkv_page_quota == 5


def test_flags_fold_into_additional_config() -> None:
    args = parse("--kv-policy", "hybrid", "--kv-page-quota", "9", additional={"other": 1})
    assert args.additional_config == {
        "other": 1,
        "budgetkv": {"policy": "hybrid", "page_quota": 9},
    }


def test_no_flag_leaves_additional_config_alone() -> None:
    assert parse(additional={"other": 1}).additional_config == {"other": 1}
    assert parse().additional_config is None


def test_two_values_of_one_option_are_an_error() -> None:
    with pytest.raises(ValueError, match="--kv-page-quota is 9 but --additional-config says"):
        parse("--kv-page-quota", "9", additional={"budgetkv": {"page_quota": 8}})
    same = parse("--kv-page-quota", "9", additional={"budgetkv": {"page_quota": 9}})
    assert same.additional_config["budgetkv"] == {"page_quota": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "hybird"}, "unknown --kv-policy 'hybird': choose one of"),
        ({"policy": "hybrid"}, "needs exactly one of --kv-page-quota"),
        ({"policy": "hybrid", "page_quota": 8, "quota_ratio": 0.5}, "got 2"),
        ({"policy": "hybrid", "page_quota": 0}, "whole number of at least 1; got 0"),
        ({"policy": "hybrid", "page_quota": -3}, "got -3"),
        ({"policy": "hybrid", "page_quota": "many"}, "got 'many'"),
        ({"policy": "hybrid", "page_quota": True}, "got True"),
        ({"policy": "hybrid", "page_quota": 2.5}, "got 2.5"),
        ({"policy": "hybrid", "quota_ratio": float("nan")}, "at most 1; got nan"),
        ({"policy": "hybrid", "quota_ratio": 1.5}, "got 1.5"),
        ({"policy": "hybrid", "quota_ratio": "half"}, "must be a number"),
        ({"policy": "full", "page_quota": 8}, "has no quota: remove --kv-page-quota"),
        ({"policy": "window", "page_quota": 8, "chunk_tokens": 0}, "--kv-chunk-tokens"),
        (
            {"policy": "window", "page_quota": 8, "static_threshold": 2.0},
            "--kv-static-threshold must be a number from 0 to 1; got 2.0",
        ),
        ({"policy": "window", "page_quota": 8, "sink_tokens": "4"}, "--kv-sink-tokens must be a w"),
        ({"policy": "window", "page_quota": 8, "lookahead": "no"}, "--kv-lookahead must be true"),
        ({"policy": "window", "page_quota": 8, "tuning": [1]}, "--kv-tuning must be a JSON object"),
        ({"polcy": "window"}, "unknown budgetkv option"),
        ({"policy": "hybrid", "page_quota": 8, "merge": "pivot"}, "unknown --kv-merge 'pivot'"),
        ({"policy": "snapkv", "page_quota": 8, "merge": "value"}, "is of --kv-policy hybrid"),
        ({"policy": "sparsemm", "page_quota": 8}, "needs --kv-head-scores-file"),
        ({"policy": "full", "report_file": ""}, "--kv-report-file must be the path of a file"),
        ({"policy": "full", "report_file": 5}, "got 5"),
        ({"policy": "sparsemm", "page_quota": 8, "head_scores_file": ["x"]}, "--kv-head-scores"),
        ({"policy": "streammem", "page_quota": 8, "lookahead": False}, "--no-kv-lookahead"),
        ({"policy": "snapkv", "page_quota": 8, "host_memory": "1GiB"}, "is of --kv-policy hybrid"),
        ({"policy": "full", "host_memory": "1GiB"}, "is of --kv-policy hybrid"),
        ({"policy": "hybrid", "page_quota": 8, "host_memory": "lots"}, "as 512MiB or 32GiB; got"),
        ({"policy": "hybrid", "page_quota": 8, "host_memory": "32"}, "as 512MiB or 32GiB; got"),
        ({"policy": "hybrid", "page_quota": 8, "host_memory": "-1GiB"}, "as 512MiB or 32GiB; got"),
        ({"policy": "hybrid", "page_quota": 8, "host_memory": 32}, "--kv-host-memory must be text"),
        ({"policy": "hybrid", "page_quota": 8, "host_memory": "0GiB"}, "keeps nothing"),
        ({"policy": "hybrid", "page_quota": 8, "lookahead_source": "video"}, "text, template$"),
        ({"policy": "hybrid", "page_quota": 8, "chunk_ends": "frames"}, "unknown budgetkv option"),
        ({"policy": "hybrid", "page_quota": 8, "template_tokens": 0}, "--kv-template-tokens"),
        (
            {"policy": "hybrid", "page_quota": 8, "probe_tokens": 99_999_999_999},
            "--kv-probe-tokens must be a whole number from 1 to 1024",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetConfig.from_mapping(options)
    with pytest.raises(ValueError, match=message):
        budget_args(**options)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"page_quota": 24}, 24),
        ({"quota_tokens": 100}, 6),
        ({"quota_ratio": 0.1}, 6),
        ({"page_quota": 5000}, 63),
    ],
    ids=["blocks", "tokens", "ratio", "capped-at-the-longest-request"],
)
def test_quota_blocks(options: dict[str, object], blocks: int) -> None:
    config = BudgetConfig(policy="window", **options)
    assert config.quota_blocks(block_tokens=16, max_model_len=1000) == blocks


@pytest.mark.parametrize(
    ("size", "host_bytes"),
    [("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("32 GB", 32 * 10**9), ("1TiB", 2**40), (None, 0)],
)
def test_host_memory_is_a_size(size: str | None, host_bytes: int) -> None:
    config = BudgetConfig(policy="hybrid", page_quota=9, host_memory=size)
    assert config.host_bytes == host_bytes
    # who recalls computes output again as it was decoded
    assert config.retrieves


def test_a_quota_below_one_block_is_refused() -> None:
    config = BudgetConfig(policy="window", quota_tokens=15)
    with pytest.raises(ValueError, match="smaller than one block of 16 tokens.*--kv-quota-tokens"):
        config.quota_blocks(block_tokens=16, max_model_len=1000)


@pytest.mark.parametrize(
    ("options", "limit_tokens"),
    [
        ({"policy": "hybrid"}, 256),
        ({"policy": "hybrid", "lookahead_tokens": 9}, 9),
        ({"policy": "hybrid", "lookahead_source": "text"}, 256),
        ({"policy": "hybrid", "lookahead_source": "template"}, 5),
        ({"policy": "streammem", "template_tokens": 7}, 7),
        ({"policy": "hybrid", "lookahead": False}, None),
        ({"policy": "snapkv"}, None),
        ({"policy": "lookm-pivot"}, None),
        ({"policy": "keydiff"}, None),
    ],
    ids=str,
)
def test_what_runs_ahead(options: dict[str, object], limit_tokens: int | None) -> None:
    config = BudgetConfig(page_quota=9, **options)
    assert (config.lookahead_limit_tokens if config.looks_ahead else None) == limit_tokens


def test_what_is_enough_of_a_question() -> None:
    """More than the template and the mark behind a picture; else all text that may run."""
    numbers = {"policy": "hybrid", "page_quota": 9, "lookahead_tokens": 40, "template_tokens": 6}
    assert BudgetConfig(**numbers, lookahead_source="question").lookahead_enough_tokens == 8
    assert BudgetConfig(**numbers, lookahead_source="text").lookahead_enough_tokens == 40
    assert BudgetConfig(**numbers, lookahead_source="template").lookahead_enough_tokens == 6


def test_budget_args_are_one_section() -> None:
    options = {"policy": "hybrid", "page_quota": 9, "window_tokens": 8}
    assert budget_args(**options) == {"additional_config": {"budgetkv": options}}
    assert BudgetConfig.from_mapping(options) == BudgetConfig(**options)


def test_a_policy_of_another_checks_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new policy with demands changes nothing in `config.py`."""

    class Demanding(WindowPolicy):
        name = "demanding"

        @classmethod
        def check(cls, options: PolicyOptions, lookahead: bool = True) -> None:
            if options.window_tokens < 99 or options.text_share != 0.25 or lookahead:
                raise ValueError("--kv-policy demanding needs --kv-window-tokens 99")

    monkeypatch.setitem(POLICIES, "window", Demanding)
    options = {"policy": "window", "page_quota": 9, "tuning": {"text_share": 0.25}}
    with pytest.raises(ValueError, match="demanding needs"):
        budget_args(**options)
    budget_args(**options, window_tokens=99, lookahead=False)


def test_tuning_reaches_the_policy() -> None:
    config = BudgetConfig(policy="hybrid", page_quota=64, tuning={"text_share": 0.25})
    assert config.policy_options().text_share == 0.25


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"text_shar": 0.25}, "unknown knob 'text_shar'"),
        ({"window_tokens": 8}, "set --kv-window-tokens instead"),
        ({"page_quota": 8}, "set --kv-page-quota instead"),
        ({"text_share": 2.0}, "--kv-tuning text_share must be a number from 0 to 1; got 2.0"),
    ],
)
def test_tuning_is_checked_at_the_start(tuning: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetConfig(policy="hybrid", page_quota=64, tuning=tuning)


def test_tuning_is_a_json_object_on_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--kv-tuning", '{"text_share": 0.25}'])
    fold_flags(args)
    assert args.additional_config == {"budgetkv": {"tuning": {"text_share": 0.25}}}


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "must be a JSON object"), ("{", "not JSON: Expecting")]
)
def test_tuning_that_is_none_is_refused_in_words(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-tuning", text])
    assert message in capsys.readouterr().err


def test_a_section_that_is_no_object_is_refused_in_words() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--kv-page-quota", "8"])
    args.additional_config = {"budgetkv": [1]}
    with pytest.raises(ValueError, match="budgetkv must be a JSON object of options"):
        fold_flags(args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request_policies": "ful"}, "--kv-request-policies has 'ful': choose among full, window"),
        ({"max_page_quota": 5}, "--kv-max-page-quota 5 is less than --kv-page-quota 9"),
        ({"request_policies": "sparsemm"}, "sparsemm needs --kv-head-scores-file"),
        ({"policy": "full", "page_quota": None, "max_page_quota": 5}, "--kv-max-page-quota means"),
        ({"policy": "full", "page_quota": None, "request_policies": "window"}, "means nothing"),
    ],
)
def test_what_requests_cannot_have_is_refused_at_start(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        BudgetConfig(**{"policy": "hybrid", "page_quota": 9, **options})


def test_an_option_may_be_of_any_policy_that_requests_may_have() -> None:
    """And those of the others do not see it."""
    config = BudgetConfig(
        policy="snapkv", page_quota=9, request_policies=" hybrid , full", host_memory="1GiB"
    )
    assert config.policies == ("snapkv", "hybrid", "full")
    assert config.of_policy("hybrid").host_bytes == 1 << 30
    assert config.of_policy("snapkv").host_bytes == 0
    assert config.of_policy("full").page_quota is None
