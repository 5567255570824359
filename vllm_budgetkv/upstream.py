"""Every vLLM symbol that we wrap, subclass, register or read, in one table, checked at start.

`check` runs when a policy is on, before anything of ours is active. `docs/upstream.md` is made
from the same table (`python -m vllm_budgetkv.upstream`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SUPPORTED_MINOR = "0.32"


@dataclass(frozen=True)
class Touchpoint:
    """One vLLM symbol.

    Args:
        module: module that defines it.
        name: dotted name inside the module.
        how: wrap, subclass, register, override or read.
        why: what we need it for.
        parameters: the parameters it must have, in order; None when only its presence counts.
    """

    module: str
    name: str
    how: str
    why: str
    parameters: tuple[str, ...] | None = None

    def resolve(self) -> Any:
        target: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            target = inspect.getattr_static(target, part)
        return target

    def problem(self) -> str | None:
        """What differs from the vLLM that this table was written for; None if nothing does."""
        try:
            target = self.resolve()
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name}: missing ({error})"
        if self.parameters is None:
            return None
        function = target.__func__ if isinstance(target, classmethod | staticmethod) else target
        found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if found == self.parameters:
            return None
        return f"{self.module}.{self.name}: takes {found}, expected {self.parameters}"


_ARGS = "vllm.engine.arg_utils"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_BACKEND = "vllm.v1.attention.backend"
_SPEC = "vllm.v1.kv_cache_interface"
_BLOCKS_ARGS = (
    "self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens",
    "num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap", "prefill_end",
)  # fmt: skip

TOUCHPOINTS = (
    Touchpoint(_ARGS, "EngineArgs.add_cli_args", "wrap", "flags: no official hook", ("parser",)),
    Touchpoint(_ARGS, "EngineArgs.from_cli_args", "wrap", "fold flags", ("cls", "args")),
    Touchpoint(
        _ARGS,
        "EngineArgs.create_engine_config",
        "wrap",
        "check the options against the engine's and name our scheduler and worker",
    ),
    Touchpoint(
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry.register",
        "register",
        "our spec and its manager",
        ("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Touchpoint(
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry._ensure_registered",
        "read",
        "registering ours first would hide the built-in specs",
        ("cls", "vllm_config"),
    ),
    Touchpoint(
        _SPEC,
        "FullAttentionSpec.max_memory_usage_bytes",
        "override",
        "start-up check counts the quota",
        ("self", "vllm_config"),
    ),
    Touchpoint(_SPEC, "FullAttentionSpec.merge", "override", "keep the quota", ("cls", "specs")),
    Touchpoint(_SPEC, "KVCacheSpec.uses_slot_mapping", "override", "pages are ours to address"),
    Touchpoint(
        _MANAGER,
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        "override",
        "admission counts min(need, quota)",
        _BLOCKS_ARGS,
    ),
    Touchpoint(
        _MANAGER,
        "SingleTypeKVCacheManager.allocate_new_blocks",
        "override",
        "growth stops at the quota",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Touchpoint(
        _MANAGER,
        "FullAttentionManager.cache_blocks",
        "override",
        "compressed blocks are never published",
        ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    Touchpoint(
        _MANAGER,
        "SingleTypeKVCacheManager.pop_blocks_for_free",
        "override",
        "forget a request",
        ("self", "request_id"),
    ),
    Touchpoint(
        _SCHEDULER, "Scheduler.add_request", "override", "hold for look-ahead", ("self", "request")
    ),
    Touchpoint(
        _SCHEDULER,
        "Scheduler.finish_requests",
        "override",
        "cancel a look-ahead with its parent",
        ("self", "request_ids", "finished_status"),
    ),
    Touchpoint(
        _SCHEDULER,
        "Scheduler._free_request",
        "override",
        "release the parent of a look-ahead",
        ("self", "request", "delay_free_blocks"),
    ),
    Touchpoint(
        _SCHEDULER,
        "Scheduler.get_request_counts",
        "override",
        "the chunk cap also holds for a lone request",
        ("self",),
    ),
    Touchpoint(
        _SCHEDULER,
        "Scheduler.update_from_output",
        "override",
        "look-ahead output reaches no client",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Touchpoint(
        _BACKEND,
        "AttentionBackend.customize_spec",
        "override",
        "our spec for every layer",
        ("cls", "spec"),
    ),
    Touchpoint(
        _BACKEND,
        "AttentionBackend.supported_kv_cache_layouts",
        "override",
        "one buffer, block outermost",
        ("cls",),
    ),
    Touchpoint(
        _BACKEND,
        "AttentionMetadataBuilder.build",
        "override",
        "rows of the batch to request slots",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Touchpoint(
        "vllm.v1.attention.backends.registry",
        "register_backend",
        "register",
        "our backend while our worker loads its model",
        ("backend", "class_path", "is_mamba"),
    ),
    Touchpoint(
        "vllm.v1.attention.selector",
        "_cached_get_attn_backend",
        "read",
        "its cache must not outlive the registration",
    ),
    Touchpoint(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker.execute_model",
        "override",
        "see each step's requests before the model runs",
        ("self", "scheduler_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.states",
        "RequestState.__init__",
        "read",
        "index_to_req_id: rows to requests (runner V2)",
    ),
)


def check() -> None:
    """Compare the installed vLLM with the table.

    Raises:
        RuntimeError: vLLM's version or one of the symbols is not what we were written for.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED_MINOR + "."):
        raise RuntimeError(
            f"vllm-budgetkv supports vLLM {SUPPORTED_MINOR}, found {vllm.__version__}: install "
            f"vllm {SUPPORTED_MINOR} or start without --kv-policy"
        )
    problems = [problem for point in TOUCHPOINTS if (problem := point.problem())]
    if problems:
        raise RuntimeError(
            "this vLLM differs from the one that vllm-budgetkv was written for; start without "
            "--kv-policy or install a matching version:\n  " + "\n  ".join(problems)
        )


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of `EngineArgs` by `wrapper(original, ...)`, once however often called.

    A class method stays one: its wrapper gets the class after the original.

    Raises:
        KeyError: the method is not in the table.
    """
    point = {p.name: p for p in TOUCHPOINTS if p.how == "wrap"}[name]
    class_name, method_name = name.split(".")
    owner = getattr(importlib.import_module(point.module), class_name)
    found = inspect.getattr_static(owner, method_name)
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    original = found.__func__ if kind else found
    if getattr(original, "_budgetkv_wraps", None) == name:
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement._budgetkv_wraps = name  # type: ignore[attr-defined]
    setattr(owner, method_name, kind(replacement) if kind else replacement)


def as_markdown() -> str:
    """The table as the text of `docs/upstream.md`."""
    lines = [
        "# What we touch in vLLM",
        "",
        f"Made from `vllm_budgetkv/upstream.py`; checked at start against vLLM {SUPPORTED_MINOR}.",
        "",
        "| symbol | how | why |",
        "|---|---|---|",
    ]
    lines += [f"| `{p.module}.{p.name}` | {p.how} | {p.why} |" for p in TOUCHPOINTS]
    return "\n".join(lines) + "\n"
