"""Serve vision-language models on a fixed amount of KV memory: a plugin for stock vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_budgetkv.start.config import BudgetConfig, budget_args

__version__ = "0.1.0"
__all__ = ["BudgetConfig", "__version__", "budget_args", "register"]


def register() -> None:
    """Entry point `vllm.general_plugins`: adds the flags. Nothing else acts without a policy."""
    from vllm_budgetkv import plugin

    plugin.register()


def __getattr__(name: str) -> Any:
    if name in ("BudgetConfig", "budget_args"):
        from vllm_budgetkv.start import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
