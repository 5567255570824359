"""The engine that a `vllm serve` line would start, as far as its configuration tells.

vLLM's own parser reads the arguments and vLLM's own classes the model, so that every option means
what it means to the server. A whole `VllmConfig` needs the device of the engine; these parts do
not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_budgetkv import plugin
from vllm_budgetkv.arithmetic.quota import good_batch_tokens
from vllm_budgetkv.cli.wishes import in_words
from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.start.config import QUOTA_FIELDS, BudgetConfig, section_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_budgetkv.cli.wishes import Wishes

DEFAULT_POLICY = "hybrid"


@dataclass(frozen=True)
class PlannedEngine:
    """An engine's configuration, on whatever device it will run; an `EngineConfig`.

    Args:
        model_config, parallel_config, cache_config, scheduler_config: vLLM's.
        section: the plugin's options that were given, by key, and the policy.
        is_policy_given: whether the policy is the user's.
        filled_in: flags that the user left open and their values, as the server must get them.
        skips_tower: whether vLLM leaves the encoder out when it measures the pool.
    """

    model_config: ModelConfig
    parallel_config: ParallelConfig
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    section: dict[str, Any]
    is_policy_given: bool
    filled_in: dict[str, Any]
    skips_tower: bool

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return str(self.section["policy"])

    @property
    def needs_quota(self) -> bool:
        """Whether the policy has a quota and none was given."""
        is_given = any(self.section.get(name) is not None for name in QUOTA_FIELDS)
        # an unknown policy is refused where the options are checked
        found = POLICIES.get(self.policy)
        return not is_given and found is not None and found.compresses

    def config(self, **options: Any) -> BudgetConfig:
        """The plugin's options, with others beside those that were given.

        Raises:
            ValueError: an option is out of range or contradicts another.
        """
        return BudgetConfig.from_mapping({**self.section, **options})


def read_arguments(arguments: Sequence[str], command: str = "plan") -> EngineArgs:
    """The engine arguments of a `vllm serve` line, read by vLLM with the plugin's flags.

    A wrong argument ends the process with vLLM's message.

    Args:
        arguments: of the line.
        command: of ours, that the message names.

    Raises:
        ValueError: a flag of ours contradicts `--additional-config`.
    """
    plugin.register()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog=f"vllm-budgetkv {command}",
        usage=f"see vllm-budgetkv {command} --help",
        add_help=False,
    )
    AsyncEngineArgs.add_cli_args(parser)
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def plan_engine(wishes: Wishes) -> PlannedEngine:
    """The engine for these wishes; what the user left open is filled in.

    Raises:
        ValueError: vLLM refuses the model or an option, or the wishes contradict each other.
        OSError: there is no such model.
    """
    given = read_arguments(["--model", wishes.model, *wishes.server])
    is_length_given = given.max_model_len is not None
    if not is_length_given:
        given.max_model_len = wishes.tokens
    model = _model_of(given, None if is_length_given else wishes.tokens)
    if wishes.tokens is not None and wishes.tokens > model.max_model_len:
        raise ValueError(
            f"--tokens {wishes.tokens} is more than --max-model-len {model.max_model_len} allows: "
            "raise the latter or lower the former"
        )
    section = dict(section_of(given.additional_config or {}))
    scheduler = _scheduler_of(given, model, section, wishes.concurrency)
    filled_in: dict[str, Any] = {}
    if wishes.tokens is not None and not is_length_given:
        filled_in["--max-model-len"] = model.max_model_len
    if given.max_num_seqs is None:
        filled_in["--max-num-seqs"] = scheduler.max_num_seqs
    if given.max_num_batched_tokens is None:
        filled_in["--max-num-batched-tokens"] = scheduler.max_num_batched_tokens
    return PlannedEngine(
        model_config=model,
        parallel_config=_parallel_of(given),
        cache_config=_cache_of(given),
        scheduler_config=scheduler,
        section={"policy": DEFAULT_POLICY, **section},
        is_policy_given="policy" in section,
        filled_in=filled_in,
        skips_tower=bool(given.skip_mm_profiling),
    )


def _model_of(given: EngineArgs, tokens: int | None) -> ModelConfig:
    """vLLM's view of the model; `tokens` if they are the length that it is asked for."""
    try:
        return given.create_model_config()
    except ValueError as error:
        if tokens is None or "max_model_len" not in str(error):
            raise
        raise ValueError(
            f"--tokens {tokens} is more than vLLM serves: {in_words(error)}"
        ) from error


def _parallel_of(given: EngineArgs) -> ParallelConfig:
    from vllm.config import ParallelConfig

    return ParallelConfig(
        tensor_parallel_size=given.tensor_parallel_size,
        pipeline_parallel_size=given.pipeline_parallel_size,
        prefill_context_parallel_size=given.prefill_context_parallel_size,
        decode_context_parallel_size=given.decode_context_parallel_size,
    )


def _cache_of(given: EngineArgs) -> CacheConfig:
    from vllm.config import CacheConfig

    return CacheConfig(
        cache_dtype=given.kv_cache_dtype,
        kv_cache_dtype_skip_layers=given.kv_cache_dtype_skip_layers,
        block_size=given.block_size or plugin.DEFAULT_PAGE_TOKENS,
        gpu_memory_utilization=given.gpu_memory_utilization,
        kv_cache_memory_bytes=given.kv_cache_memory_bytes,
        num_gpu_blocks_override=given.num_gpu_blocks_override,
    )


def _scheduler_of(
    given: EngineArgs, model: ModelConfig, section: dict[str, Any], concurrency: int
) -> SchedulerConfig:
    """Where the batch is open: no more requests than shall run at once, and whole chunks."""
    from vllm.config import SchedulerConfig

    max_num_seqs = given.max_num_seqs or concurrency
    batch_tokens = given.max_num_batched_tokens
    if batch_tokens is None:
        chunk_tokens = section.get("chunk_tokens", BudgetConfig.chunk_tokens)
        batch_tokens = good_batch_tokens(
            SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS,
            min(chunk_tokens, model.max_model_len),
            max_num_seqs,
        )
    return SchedulerConfig(
        max_model_len=model.max_model_len,
        is_encoder_decoder=model.is_encoder_decoder,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batch_tokens,
        max_num_scheduled_tokens=given.max_num_scheduled_tokens,
    )
