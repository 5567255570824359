"""What `tests.tamper` breaks on purpose is still there to be broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tamper.__main__ import TESTS
from tests.tamper.mutations import MUTATIONS

if TYPE_CHECKING:
    from tests.tamper.mutation import Mutation

PACKAGE = Path(__file__).parent.parent / "vllm_budgetkv"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_stands_there_once(mutation: Mutation) -> None:
    source = (PACKAGE / mutation.module).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1 and mutation.new != mutation.old


@pytest.mark.parametrize("test", TESTS)
def test_what_is_to_find_it_is_there(test: str) -> None:
    """The bug: two tests had moved, and no mutation was tried any more."""
    path, _, name = test.partition("::")
    target = PACKAGE.parent / path
    assert target.exists()
    assert not name or f"def {name}(" in target.read_text(encoding="utf-8")
