"""A plan for people: tables, what they mean, and the line to paste. `--json` for scripts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_budgetkv.cli.figures import Figure, size_text
from vllm_budgetkv.cli.plan_json import as_json_object
from vllm_budgetkv.cli.plan_words import heading, notes, results
from vllm_budgetkv.cli.serve_line import serve_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm_budgetkv.cli.encoder import Encoder
    from vllm_budgetkv.cli.memory import Pool
    from vllm_budgetkv.cli.plan import HostPlan, Plan


def show_plan(plan: Plan, *, as_json: bool, console: Console | None = None) -> None:
    """Write the plan to the terminal, or one JSON object."""
    console = console or Console(highlight=False)
    if as_json:
        console.out(json.dumps(as_json_object(plan), indent=2), highlight=False)
        return
    console.print(heading(plan), style="bold", markup=False)
    for title, table in _tables(plan):
        console.print()
        console.print(title, style="bold")
        console.print(table)
    console.print()
    console.print(_lines(results(plan), style="bold"))
    console.print()
    console.print(serve_line(plan), markup=False, soft_wrap=True, style="cyan")
    found = [("-", note) for note in notes(plan)]
    if found:
        console.print()
        console.print(_lines(found, style="dim"))


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    gpus = plan.engine.parallel_config.tensor_parallel_size
    title = f"One request of {plan.tokens:,} tokens" + (", on each GPU" if gpus > 1 else "")
    yield title, _request_table(plan)
    if plan.pool is not None and plan.pool.shares:
        yield "Memory of each GPU", _memory_table(plan.pool)
    if plan.encoder is not None and plan.encoder.cache is not None:
        yield "Pictures and videos", _encoder_table(plan.encoder)
    if plan.host is not None:
        yield "Host memory of each worker", _host_table(plan.host, plan.quota.page_tokens)


def _lines(pairs: Iterable[tuple[str, str]], style: str) -> Table:
    """A word and what it says, which hangs behind it where it is long."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style=style, no_wrap=True)
    grid.add_column(style="dim" if style == "dim" else None)
    for word, text in pairs:
        grid.add_row(word, Text(text))
    return grid


def _table(*columns: str, num_texts: int = 0) -> Table:
    """A table whose first column names a row. The last `num_texts` are words, others figures."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        is_text = number == 0 or number >= len(columns) - num_texts
        table.add_column(column, justify="left" if is_text else "right")
    return table


def _request_table(plan: Plan) -> Table:
    """Ours beside stock vLLM's; the latter alone where no quota is needed."""
    ours, stock, is_needed = plan.cost, plan.stock, plan.choice.is_needed
    page_tokens = ours.page_tokens
    rows = [
        ("KV bytes of a token", size_text(ours.token_bytes), size_text(stock.token_bytes)),
        (f"blocks of {page_tokens} tokens", f"{ours.blocks:,}", f"{stock.blocks:,}"),
        ("KV cache", size_text(ours.num_bytes), size_text(stock.num_bytes)),
    ]
    if is_needed:
        rows += [
            ("page tables and probe", size_text(plan.slot_bytes), "-"),
            ("tokens a head may hold", f"{ours.blocks * page_tokens:,}", f"{plan.tokens:,}"),
            ("tokens a head keeps (budget)", f"{plan.kept_tokens:,}", f"{plan.tokens:,}"),
        ]
    if ours.at_once is not None and stock.at_once is not None:
        rows.append(("such requests at once", f"{ours.at_once:,}", f"{stock.at_once:,}"))
    table = _table("", *[plan.choice.config.policy] * is_needed, "full cache")
    for name, of_ours, of_stock in rows:
        table.add_row(name, *[of_ours] * is_needed, of_stock)
    return table


def _memory_table(pool: Pool) -> Table:
    table = _table("", "size", "from", num_texts=1)
    assert pool.total is not None
    table.add_row("vLLM takes", size_text(pool.total.num_bytes), pool.total.source)
    for name, share in pool.shares.items():
        table.add_row(f"- {name}", size_text(share.num_bytes), _origin(share))
    table.add_section()
    table.add_row("KV cache", size_text(pool.num_bytes), "what is left")
    return table


def _origin(figure: Figure) -> str:
    """Where a figure comes from; formulas are long and stand in the notes."""
    if figure.origin == "estimate":
        return "estimate, see below"
    return f"{figure.origin}: {figure.source}"


def _encoder_table(encoder: Encoder) -> Table:
    table = _table("", "tokens", "size", "", num_texts=1)
    for kind, tokens in encoder.item_tokens.items():
        table.add_row(f"largest {kind}", f"{tokens:,}", "", "")
    if encoder.cache is not None:
        cache = encoder.cache
        tokens_text = f"{encoder.cache_tokens:,}"
        table.add_row("encoder cache", tokens_text, size_text(cache.num_bytes), cache.origin)
    if encoder.whole_tokens not in (None, encoder.cache_tokens):
        table.add_row("with whole videos", f"{encoder.whole_tokens:,}", "", "stock vLLM")
    if encoder.tower is not None:
        table.add_row(
            "vision tower's peak", "", size_text(encoder.tower.num_bytes), _origin(encoder.tower)
        )
    return table


def _host_table(host: HostPlan, page_tokens: int) -> Table:
    table = _table("", "")
    table.show_header = False
    table.add_row("--kv-host-memory", size_text(host.num_bytes))
    table.add_row(f"blocks of {page_tokens} tokens", f"{host.blocks:,}")
    table.add_row("one such request", size_text(host.request_bytes))
    table.add_row("such requests at once", f"{host.at_once:,}")
    if host.room is not None:
        table.add_row("pages of index, of a head that recalls", f"{host.room.index_pages:,}")
        table.add_row("pages for what comes back", f"{host.room.slot_pages:,}")
        table.add_row("tokens a head keeps beside them", f"{host.room.resident_tokens:,}")
    return table
