"""Runs spread over worker processes; finished ones are kept on disk, failed ones are reported."""

from __future__ import annotations

import json
import queue
import traceback
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor
    from pathlib import Path

Result = TypeVar("Result")


class Run(Protocol):
    """One engine and what it is asked, of whichever lab."""

    @property
    def title(self) -> str:
        """For progress and errors; no two runs of a plan have the same."""

    @property
    def num_examples(self) -> int:
        """How much of the progress bar it is."""

    def key(self, fingerprint: str) -> str:
        """Name of its result: equal only for the same run of the same model and suite."""


@dataclass(frozen=True)
class Cache(Generic[Result]):
    """Results of finished runs, one file each.

    Args:
        folder: where they are.
        fingerprint: of the model.
        result: the class of a result, a dataclass.
        fresh: do not use what is there.
    """

    folder: Path
    fingerprint: str
    result: type[Result]
    fresh: bool = False

    def load(self, run: Run) -> Result | None:
        file = self._file(run)
        if self.fresh or not file.is_file():
            return None
        return self.result(**json.loads(file.read_text(encoding="utf-8")))

    def store(self, run: Run, result: Result) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._file(run).with_suffix(".draft")
        draft.write_text(json.dumps(asdict(result)), encoding="utf-8")
        draft.replace(self._file(run))

    def _file(self, run: Run) -> Path:
        return self.folder / f"{run.key(self.fingerprint)}.json"


class Worker:
    """One process that measures one run after the other; a new one follows if it dies.

    Args:
        start: starts the process.
    """

    def __init__(self, start: Callable[[], Executor]) -> None:
        self._start = start
        self._executor = start()

    def try_run(self, measure: Callable[[Any], Result], run: Any) -> Result | BaseException:
        """The result, or what went wrong."""
        future = self._executor.submit(measure, run)
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, BrokenExecutor):
            self.close()
            self._executor = self._start()
        return error

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def run_all(
    runs: Sequence[Run],
    cache: Cache[Result],
    measure: Callable[[Any], Result],
    workers: Sequence[Worker],
    name: str,
) -> tuple[list[Result], dict[str, BaseException]]:
    """Measure what the cache does not have.

    Args:
        runs: what to measure.
        cache: is read, and gets every run as soon as it is finished.
        measure: called in a process of a worker.
        workers: as many runs as there are workers are measured at once.
        name: of the progress bar.

    Returns:
        (results in the order of `runs` less those that failed, errors by the title of the run)
    """
    found = {run.title: cache.load(run) for run in runs}
    todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if found[run.title] is None:
            todo.put(run)
    errors: dict[str, BaseException] = {}
    total = sum(run.num_examples for run in runs)
    done = sum(run.num_examples for run in runs if found[run.title])
    with tqdm(total=total, initial=done, unit="example", desc=name, smoothing=0.05) as bar:

        def work(worker: Worker) -> None:
            while True:
                try:
                    run = todo.get_nowait()
                except queue.Empty:
                    return
                result = worker.try_run(measure, run)
                if isinstance(result, BaseException):
                    errors[run.title] = result
                    bar.write(
                        f"FAILED {run.title}:\n" + "".join(traceback.format_exception(result))
                    )
                else:
                    cache.store(run, result)
                    found[run.title] = result
                bar.update(run.num_examples)

        with ThreadPoolExecutor(len(workers)) as threads:
            # list() raises what a thread raised
            list(threads.map(work, workers))
    return [result for run in runs if (result := found[run.title])], errors
