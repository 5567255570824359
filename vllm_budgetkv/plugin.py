"""START HERE: how the plugin gets into vLLM.

`register` runs in every process. It wraps four methods of `EngineArgs`, which do nothing unless
a policy is asked for. With a policy, `activate` turns one `VllmConfig` into ours: the scheduler
and worker classes are named there, and everything else follows from those two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.quota import good_batch_tokens
from vllm_budgetkv.start import upstream
from vllm_budgetkv.start.cli import add_flags, fold_flags
from vllm_budgetkv.start.config import SECTION, BudgetConfig, section_of

if TYPE_CHECKING:
    import argparse

    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

DEFAULT_PAGE_TOKENS = 16


def register() -> None:
    """Install the flags and the configuration hook once; later calls do nothing."""
    upstream.wrap("EngineArgs.add_cli_args", _add_cli_args)
    upstream.wrap("EngineArgs.from_cli_args", _from_cli_args)
    upstream.wrap("EngineArgs.create_engine_config", _create_engine_config)
    upstream.wrap(
        "EngineArgs._set_default_max_num_seqs_and_batched_tokens_args", _set_default_batch
    )


def _add_cli_args(original: Any, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = original(parser)
    add_flags(parser)
    return parser


def _from_cli_args(original: Any, cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
    fold_flags(args)
    return original(cls, args)


def _create_engine_config(original: Any, self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
    additional = self.additional_config
    if not isinstance(additional, dict) or SECTION not in additional:
        return original(self, *args, **kwargs)
    config = BudgetConfig.from_mapping(section_of(additional))
    upstream.check()
    _prepare_arguments(self, config)
    vllm_config = original(self, *args, **kwargs)
    from vllm_budgetkv.start.activation import activate

    activate(vllm_config, config)
    from vllm_budgetkv.start import front_end

    # this process has the requests of the engine that it configures
    front_end.install()
    return vllm_config


def _prepare_arguments(engine_args: EngineArgs, config: BudgetConfig) -> None:
    """Set what must be known before vLLM derives the rest. Mutates `engine_args`."""
    if engine_args.block_size is None:
        engine_args.block_size = DEFAULT_PAGE_TOKENS
    if not config.compresses:
        return
    threshold_tokens = engine_args.long_prefill_token_threshold
    if threshold_tokens and threshold_tokens != config.chunk_tokens:
        raise ValueError(
            f"--long-prefill-token-threshold {threshold_tokens} contradicts --kv-chunk-tokens "
            f"{config.chunk_tokens}: both are the most prompt tokens of a request in one step; "
            "remove the former"
        )


def _set_default_batch(
    original: Any,
    self: EngineArgs,
    usage_context: UsageContext | None,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> None:
    """Where vLLM chooses the size of a batch, let it hold whole chunks beside every decode."""
    is_given = self.max_num_batched_tokens is not None
    original(self, usage_context, model_config, parallel_config)
    additional = self.additional_config
    if is_given or not isinstance(additional, dict) or SECTION not in additional:
        return
    config = BudgetConfig.from_mapping(section_of(additional))
    if config.compresses:
        assert self.max_num_batched_tokens is not None and self.max_num_seqs is not None
        chunk_tokens = min(config.chunk_tokens, model_config.max_model_len)
        self.max_num_batched_tokens = good_batch_tokens(
            self.max_num_batched_tokens, chunk_tokens, self.max_num_seqs
        )
