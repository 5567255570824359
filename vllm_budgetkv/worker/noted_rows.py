"""Rows of a batch whose metadata does not name them: recurrent layers, Model Runner V2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass
class NotedRows:
    """Request ids of the rows of the batch that Model Runner V2 prepares.

    For other models it says in the metadata which request a row is of; for those with recurrent
    layers it leaves that out, though its batch knows.

    Args:
        ids: by row; filled whenever metadata are about to be built.
    """

    ids: Sequence[str] = field(default=(), init=False)

    def watch(self, runner: Any) -> None:
        """Note the rows of every batch that `runner` prepares from now on; mutates it."""
        name = "MambaHybridModelState.prepare_attn"
        upstream.replace_in(runner.model_state, name, self._prepare)

    def _prepare(
        self, original: Callable[..., Any], input_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.ids = input_batch.req_ids
        return original(input_batch, *args, **kwargs)
