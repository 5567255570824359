"""A file of conversations, answered by workers of a Ray cluster.

    python -m vllm_budgetkv.ray INPUT.jsonl OUT_DIR --workers 8 --model MODEL --kv-page-quota 64 ...

Rows are in OpenAI's batch format, as for `vllm run-batch`. Each worker has a `vllm serve` of its
own, so every option of it works here and every row gets what a client would get, its KV report
too. What is answered is written at once; the same command again goes on where the last one ended.
`docs/batch.md` says more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.batch.answerer import Answerer
from vllm_budgetkv.batch.folder import Folder
from vllm_budgetkv.batch.progress import Progress
from vllm_budgetkv.batch.rows import BadRow, Row, as_item, error_of, index
from vllm_budgetkv.batch.server import ServerGone

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STORY = """\
Answers a file of conversations on a Ray cluster, or on this machine where there is none.

Every other option is one of `vllm serve` and means the same here, as --model, --kv-policy,
--kv-page-quota, --max-model-len, --tensor-parallel-size, --allowed-local-media-path.
"""
EXAMPLE = """\
example:
  python -m vllm_budgetkv.ray questions.jsonl answers --workers 2 \\
      --model Qwen/Qwen2.5-VL-7B-Instruct --kv-policy hybrid --kv-page-quota 64
"""
# a row that ends its server does so again: then the batch ends, and what is answered stays
MAX_RETRIES = 3
# the engine has the rows of one batch while those of another are read and written
BATCHES_AT_ONCE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit status: 0 when every row has an answer or an error, 1 when workers failed, 2 for
        what is refused before any of them starts.
    """
    parser = _parser()
    options, of_server = parser.parse_known_args(arguments)
    try:
        rows = list(index(options.input_file))
        folder = Folder(options.out_dir, of_server, accept_others=options.accept_other_options)
        waiting = [row for row in rows if isinstance(row, Row) and not _is_done(folder, row)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    progress = Progress(total_rows=len(rows), done_rows=len(folder.done))
    with closing(folder):
        _write(folder, progress, [error_of(row) for row in rows if isinstance(row, BadRow)])
        try:
            for answers in _answers(options, of_server, waiting):
                _write(folder, progress, answers)
        except (BatchFailed, KeyboardInterrupt) as error:
            progress.tell(f"{error or 'interrupted'}\n{progress.line()}; run it again to go on")
            return 1
    progress.tell(progress.line())
    return 0


class BatchFailed(RuntimeError):
    """Ray or a worker failed, and what it said."""


def _is_done(folder: Folder, row: Row) -> bool:
    return folder.is_done(row.custom_id, f"budgetkv-{row.key}")


def _write(folder: Folder, progress: Progress, answers: list[dict[str, Any]]) -> None:
    if answers:
        folder.write(answers)
        progress.add(answers)


def _answers(
    options: argparse.Namespace, of_server: list[str], waiting: list[Row]
) -> Iterator[list[dict[str, Any]]]:
    """Answers as workers give them, a batch of rows at a time."""
    if not waiting:
        return
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise BatchFailed(f"{error}: pip install 'vllm-budgetkv[ray]'") from error
    _connect(options.ray_address)
    try:
        yield from _stream(options, of_server, waiting)
    except ray.exceptions.RayError as error:
        # a worker's words stand behind the frames of Ray's own code
        raise BatchFailed(str(error).rpartition(f"{ServerGone.__name__}: ")[2]) from error
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Join the cluster at `address` or at RAY_ADDRESS, or start one of this machine alone."""
    import ray

    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, logging_level=logging.WARNING)
    else:
        ray.init(logging_level=logging.WARNING, include_dashboard=False)


def _stream(
    options: argparse.Namespace, of_server: list[str], waiting: list[Row]
) -> Iterator[list[dict[str, Any]]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # whoever is ready first is written first
    context.execution_options.preserve_order = False
    num_gpus = options.gpus_per_worker
    if num_gpus is None:
        num_gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    num_batches = -(-len(waiting) // options.batch_rows)
    rows = ray.data.from_items([as_item(row) for row in waiting], override_num_blocks=num_batches)
    answers = rows.map_batches(
        Answerer,
        fn_constructor_args=(str(options.input_file.absolute()), of_server),
        batch_size=options.batch_rows,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=options.workers,
            max_tasks_in_flight_per_actor=BATCHES_AT_ONCE,
            max_concurrent_calls_per_actor=BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=options.cpus_per_worker,
        num_gpus=num_gpus,
        max_task_retries=MAX_RETRIES,
    )
    for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
        yield [json.loads(text) for text in batch["answer"]]


def _parser() -> argparse.ArgumentParser:
    # an option that is not known here is the server's, never an abbreviation of ours
    parser = argparse.ArgumentParser(
        prog="python -m vllm_budgetkv.ray",
        usage="%(prog)s INPUT OUT_DIR [--workers N] [options of vllm serve]",
        description=STORY,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input_file", type=Path, metavar="INPUT", help="rows, as JSON lines; all workers see it")
    add("out_dir", type=Path, metavar="OUT_DIR", help="folder of answers; this process sees it")
    add("--workers", type=_count, default=1, metavar="N", help="servers at once (default: 1)")
    add(
        "--gpus-per-worker",
        type=float,
        metavar="N",
        help="as many as --tensor-parallel-size (default: 1 where the cluster has GPUs)",
    )
    add("--cpus-per-worker", type=float, default=1, metavar="N", help="default: 1")
    add(
        "--batch-rows",
        type=_count,
        default=32,
        metavar="N",
        help="rows that a worker takes and gives back at once (default: 32)",
    )
    add("--ray-address", metavar="ADDRESS", help="of a running cluster (default: RAY_ADDRESS)")
    add(
        "--accept-other-options",
        action="store_true",
        help="go on in a folder whose answers were made with other options of the server",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
