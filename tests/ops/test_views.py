"""What the ops take: few arguments, the same in each implementation, refused if they misfit."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import batch_rows, make_cache
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_budgetkv.ops import PagedHeads

OPS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
MAX_PARAMETERS = 7


def parameters(function: Callable[..., object]) -> list[str]:
    return [*inspect.signature(function).parameters]


@pytest.mark.parametrize("folder", ["reference", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_every_implementation_takes_what_the_op_takes(name: str, folder: str) -> None:
    if folder == "triton":
        pytest.importorskip("triton")
    taken = parameters(getattr(ops, name))
    assert len(taken) <= MAX_PARAMETERS
    module = import_module(f"vllm_budgetkv.ops.{folder}.{name}")
    # some references take the dtype that they compute in too
    assert parameters(getattr(module, name))[: len(taken)] == taken


def cut_heads(heads: PagedHeads) -> PagedHeads:
    return heads._replace(lens=heads.lens[..., :-1])


def long_lens(heads: PagedHeads) -> PagedHeads:
    return heads._replace(lens=heads.lens.long())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(cut_heads, r"lens is torch.int32 \[.*1\]"), (long_lens, "lens is torch.int64")],
)
def test_heads_that_do_not_fit_their_table_are_refused(
    spoil: Callable[[PagedHeads], PagedHeads], message: str
) -> None:
    cache = make_cache([[8, 8], [3, 0]], PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match=message):
        require.require_layer(spoil(cache.heads))
    with pytest.raises(ValueError, match=message):
        require.require_request(spoil(cache.heads_of(0)))


def test_heads_of_a_request_are_not_those_of_all_slots() -> None:
    cache = make_cache([[8, 8], [3, 0]], PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match=r"table is .* pass torch.int32 \[any, any, any\]"):
        require.require_layer(cache.heads_of(0))
    with pytest.raises(ValueError, match=r"table is .* pass torch.int32 \[any, any\]"):
        require.require_request(cache.heads)


def test_stacks_of_other_slots_are_refused() -> None:
    cache = make_cache([[8, 8], [3, 0]], PageLayout(8, 32, torch.float32))
    with pytest.raises(ValueError, match=r"free_pages is .* pass torch.int32 \[2, any\]"):
        require.require_stacks(cache.stack_of(0), cache.heads)
    lower = cache.stack._replace(num_free=cache.stack.num_free[:1])
    with pytest.raises(ValueError, match=r"num_free is .* pass torch.int32 \[2\]"):
        require.require_stacks(lower, cache.heads)


def test_rows_without_their_end_are_refused() -> None:
    rows = batch_rows([0, 1], [3, 1])
    with pytest.raises(ValueError, match=r"query_start is .* pass torch.int32 \[3\]"):
        require.require_rows(rows._replace(query_start=rows.query_start[:-1]))
