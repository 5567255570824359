"""Builds every family and makes docs/models.md.

    python -m tests.families.run                    # all of them, within 45 minutes on two cores
    python -m tests.families.run --only "Qwen3-VL"  # some; others stay as they were

What was found is in results.json beside this file, with the commit at which it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.e2e import engines
from tests.e2e.both_ways import UNCUT
from tests.families import asked, checks, page
from tests.families.catalogue import FAMILIES
from tests.families.folders import folder_of

if TYPE_CHECKING:
    from tests.families.family import Family

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# blocks that hold any of the short requests
ROOMY_BLOCKS = 40
CHUNK_TOKENS = 96
NAMES = {"v1": "V1", "v2": "V2", "compiled": "V1 compiled"}
LOAD_FORMAT = "noise"
ENGINES, JUDGE = "tests.families.job", "tests.families.judge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    results = read(options.results)
    chosen = [FAMILIES[name] for name in options.only or FAMILIES]
    told = refusals(chosen)
    for family in chosen:
        started = time.monotonic()
        results[family.name] = {**result_of(family, told), "commit": commit(), "machine": machine()}
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        options.results.write_text(text, encoding="utf-8")
        options.page.write_text(page.page_of(results), encoding="utf-8")
        found = results[family.name]
        seconds = time.monotonic() - started
        print(f"{family.name}: {found.get('failed') or found['verdict']} ({seconds:.0f} s)")  # noqa: T201
        sys.stdout.flush()
    failed = [family.name for family in chosen if "failed" in results[family.name]]
    if failed:
        sys.exit(f"not as promised: {', '.join(failed)}")


def read(path: Path) -> dict[str, Any]:
    """Results by name of the family."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def refusals(families: list[Family]) -> dict[str, str]:
    """What the start says of those that are to be refused, by name."""
    found = {family.name: arguments_of(family) for family in families if family.refused}
    for arguments in found.values():
        arguments["additional_config"] = {"budgetkv": roomy()}
    return ask({"engines": found}) if found else {}


def result_of(family: Family, told: dict[str, str]) -> dict[str, Any]:
    """What is written down of a family."""
    if family.unbuilt:
        return {"verdict": "not built", "reason": family.unbuilt}
    if family.refused:
        said = told[family.name]
        if family.refused not in said:
            return {"verdict": "refused", "failed": f"the start says {said!r}"}
        return {"verdict": "refused", "reason": said.splitlines()[-1].removeprefix("  - ")}
    try:
        return {"verdict": "served", **served(family)}
    except AssertionError as error:
        return {"verdict": "served", "failed": str(error)[-2000:]}


def served(family: Family) -> dict[str, Any]:
    """Run a family in all of its modes."""
    answers = run(family)
    stock = answers["stock"]
    checks.depends(stock)
    modes = {"v1": answers}
    for mode in family.modes:
        modes[mode] = run(family, mode)
    for mode, found in modes.items():
        checks.on_the_path(mode, stock, found["fits"])
    return {
        **{name: answers["fits"][name] for name in ("class", "layers", "positions")},
        "dtype": family.dtype,
        "tested": {
            NAMES[mode]: {
                "lossless": checks.lossless(family, stock, found["fits"]),
                "bound": checks.bound(family, found["tight"]),
                "probe": checks.probed(family, found["proof"]),
            }
            for mode, found in modes.items()
        },
    }


def run(family: Family, mode: str = "v1") -> dict[str, Any]:
    """Answers of a family's engines in a mode; in the first one those of stock or a judge too."""
    short = {"requests": asked.short_requests(family)}
    runs = {
        "stock": stock(family),
        "fits": {"budget": roomy(), **short},
        "tight": {"budget": tight(family), "requests": asked.long_requests(family)},
    }
    if mode != "v1" or not family.runs_in_stock:
        del runs["stock"]
    engine = {**arguments_of(family), "enforce_eager": mode != "compiled"}
    answers = ask({"engine": engine, "runs": runs}, runner="v2" if mode == "v2" else "v1")
    if mode == "v1" and not family.runs_in_stock:
        answers["stock"] = ask({"model": engine["model"], "rounds": False, **short}, module=JUDGE)
    return answers


def stock(family: Family) -> dict[str, Any]:
    """The run of vLLM as it is, or as it should be of pictures that attend both ways."""
    uncut = UNCUT if family.both_ways else {}
    return {
        "budget": None,
        "requests": asked.short_requests(family),
        "both_ways": family.both_ways,
        "engine": {"block_size": 32, **uncut},
    }


def arguments_of(family: Family) -> dict[str, Any]:
    """Arguments of the engines of a family."""
    sees = family.sight is not None
    engine: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512 if sees else 256,
        "dtype": family.dtype,
        # of models with recurrent state a page, not a block
        "block_size": 16 if family.dtype == "bfloat16" else 32,
        "load_format": "auto" if family.folder else LOAD_FORMAT,
        "limit_mm_per_prompt": limits(family),
        "media_io_kwargs": engines.VISION["media_io_kwargs"],
        **family.engine,
    }
    if not sees:
        del engine["limit_mm_per_prompt"], engine["media_io_kwargs"]
    return engines.arguments_of(folder_of(family), **engine)


def limits(family: Family) -> dict[str, int]:
    """Most items of a prompt."""
    has_video = family.sight is not None and family.sight.video
    pictures = family.sight.most_pictures if family.sight else 0
    return {"image": pictures, **({"video": 1} if has_video else {})}


def roomy() -> dict[str, Any]:
    """A quota that holds the short requests."""
    return {
        "policy": "hybrid",
        "page_quota": ROOMY_BLOCKS,
        "chunk_tokens": CHUNK_TOKENS,
        "check_ledger": True,
    }


def tight(family: Family) -> dict[str, Any]:
    """A quota of a tenth of the long requests."""
    return {
        **roomy(),
        "page_quota": family.page_quota,
        "decode_interval_tokens": 16,
        "window_tokens": 16,
    }


def ask(job: dict[str, Any], runner: str = "v1", module: str = ENGINES) -> dict[str, Any]:
    """Run a job in a process of its own.

    Raises:
        AssertionError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = engines.environment(runner=runner)
        return engines.answer_of(module, job, Path(folder), variables, 900)


def commit() -> str:
    """The commit of this checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """What it ran on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"


if __name__ == "__main__":
    main()
