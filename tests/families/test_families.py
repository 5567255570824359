"""The table of models says what is so: some rows are run, all are held against the catalogue."""

from __future__ import annotations

import shlex
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import transformers
from vllm.model_executor.models import ModelRegistry

from tests.families import asked, checks, page, run
from tests.families.catalogue import FAMILIES

# those whose layers or positions no other engine test has; the others run with the whole table
IN_CI = ("Qwen3-VL", "GLM-4.1V", "Ministral 3", "OLMo 2")
WRITTEN = run.read(run.RESULTS)
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


@pytest.mark.engine
@pytest.mark.parametrize("name", IN_CI)
def test_a_family_is_served_as_promised(name: str) -> None:
    found = run.result_of(replace(FAMILIES[name], modes=()), {})
    assert "failed" not in found, found["failed"]


@pytest.mark.engine
def test_refused_families_are_refused_in_the_words_of_the_table() -> None:
    families = [FAMILIES[name] for name in REFUSED]
    told = run.refusals(families)
    for family in families:
        found = run.result_of(family, told)
        assert "failed" not in found, found["failed"]
        assert found["reason"] == WRITTEN.get(family.name, found)["reason"]


def test_every_family_was_run() -> None:
    """Eighteen rows of the table once said "not run", and no test minded."""
    missing, gone = set(FAMILIES) - set(WRITTEN), set(WRITTEN) - set(FAMILIES)
    assert not missing, f"run python -m tests.families.run --only {shlex.join(sorted(missing))}"
    assert not gone, f"of no family any more: {sorted(gone)}"


def test_the_table_is_what_was_found() -> None:
    written = run.PAGE.read_text(encoding="utf-8")
    assert written == page.page_of(WRITTEN), "run python -m tests.families.run"


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_found_is_what_is_expected(name: str) -> None:
    family, found = FAMILIES[name], WRITTEN[name]
    assert "failed" not in found
    expected = "not built" if family.unbuilt else "refused" if family.refused else "served"
    assert found["verdict"] == expected
    if expected == "served":
        assert set(found["tested"]) == {run.NAMES[mode] for mode in ("v1", *family.modes)}


def test_vllm_knows_every_class() -> None:
    """Or takes it from Transformers, of whose decoders it runs any."""
    named = {family.architecture for family in FAMILIES.values()}
    others = named - set(ModelRegistry.get_supported_archs())
    assert all(hasattr(transformers, name) for name in others), others


FAMILY = FAMILIES["Qwen3"]
ANSWERED: dict[str, Any] = {
    "answers": {
        f"r{number}": {
            "prompt_tokens": 1700,
            "tokens": [number, *range(9, 8 + asked.LONG_OUTPUT_TOKENS)],
            "logprobs": [
                {str(token): -1.0, "5": -1.1}
                for token in (number, *range(9, 8 + asked.LONG_OUTPUT_TOKENS))
            ],
        }
        for number in range(asked.NUM_LONG)
    },
    "held": {f"r{number}": FAMILY.page_quota for number in range(asked.NUM_LONG)},
    "running_at_once": asked.NUM_LONG,
    "block_tokens": 32,
    "engine": {"leftovers": 0},
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """`ANSWERED` with another value at a place."""
    answer = deepcopy(ANSWERED)
    place: Any = answer
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return answer


def test_the_page_counts_no_row_that_failed() -> None:
    """A row that was not as promised was counted among those that are served."""
    verdict = {"verdict": "served"}
    counted = page.page_of({"Qwen2": verdict, "Qwen3": {**verdict, "failed": "a token differs"}})
    assert "\n1 served, 0 refused, 0 not built.\n" in counted


def test_what_is_as_promised_passes() -> None:
    checks.depends(ANSWERED)
    assert checks.lossless(FAMILY, ANSWERED, ANSWERED)["error"] == 0.0
    assert checks.bound(FAMILY, ANSWERED) == {"quota_tokens": 160, "prompt_tokens": 1700}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tokens", 3), 5),
        (("logprobs", 3, "11"), -1.0001),
    ],
)
def test_another_token_or_likelihood_is_found(path: tuple[Any, ...], value: Any) -> None:
    ours = changed("answers", "r1", *path, to=value)
    with pytest.raises(AssertionError, match="differ"):
        checks.lossless(FAMILY, ANSWERED, ours)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("held", "r2"), FAMILY.page_quota + 1),
        (("answers", "r2", "prompt_tokens"), 1599),
        (("running_at_once",), 3),
        (("engine", "leftovers"), 1),
        (("answers", "r2", "tokens"), [1, 2]),
    ],
)
def test_what_is_out_of_bounds_is_found(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(AssertionError):
        checks.bound(FAMILY, changed(*path, to=value))


def test_a_query_that_turned_wrongly_is_found() -> None:
    with pytest.raises(AssertionError, match="off by"):
        checks.probed(FAMILY, {"layers": 2, "turned": 2, "error": 1e-4})


def test_answers_that_say_the_same_are_found() -> None:
    with pytest.raises(AssertionError, match="equal answers"):
        checks.depends(changed("answers", "r0", to=ANSWERED["answers"]["r1"]))
