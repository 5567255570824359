"""The Grafana dashboard of `vllm:budgetkv_*`, written by Grafana's own builders.

    python -m tools.dashboard > monitoring/grafana.json

Needs `grafana-foundation-sdk`, which is made from Grafana's published schema.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS = 'model_name=~"$model"'
INTERVAL = "$__rate_interval"


class Query(NamedTuple):
    expression: str
    legend: str


class Plot(NamedTuple):
    title: str
    meaning: str
    unit: str
    queries: tuple[Query, ...]


def rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}{{{OURS}}}[{INTERVAL}]))"


def quantile(share: float, name: str, by: str = "le") -> str:
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', by)})"


PLOTS = (
    Plot(
        "Requests that ended",
        "By policy and by how they ended.",
        "reqps",
        (
            Query(
                rate("vllm:budgetkv_requests_total", "policy, outcome"), "{{policy}} {{outcome}}"
            ),
            Query(rate("vllm:budgetkv_refused_requests_total", "model_name"), "refused"),
        ),
    ),
    Plot(
        "Most blocks of a request",
        "Never above its quota; half of the requests and 95 of 100, beside what a request gets "
        "that asks for nothing.",
        "short",
        (
            Query(quantile(0.5, "vllm:budgetkv_request_peak_blocks"), "half"),
            Query(quantile(0.95, "vllm:budgetkv_request_peak_blocks"), "95 of 100"),
            Query(f"max(vllm:budgetkv_quota_blocks{{{OURS}}})", "quota"),
        ),
    ),
    Plot(
        "Retained attention",
        "Estimated share of the question's attention that prompts retained. Low: the quota is too "
        "small for what is asked, or host memory is needed.",
        "percentunit",
        (
            Query(quantile(0.5, "vllm:budgetkv_retained_mass"), "half of the requests"),
            Query(quantile(0.1, "vllm:budgetkv_retained_mass"), "10 of 100"),
        ),
    ),
    Plot(
        "Blocks reclaimed",
        "Blocks a second that a full cache would have held beyond what requests held.",
        "short",
        (Query(rate("vllm:budgetkv_reclaimed_blocks_total", "engine"), "engine {{engine}}"),),
    ),
    Plot(
        "Tokens evicted",
        "Prompt tokens a second that heads of one rank dropped.",
        "short",
        (Query(rate("vllm:budgetkv_evicted_tokens_total", "head_class"), "{{head_class}} heads"),),
    ),
    Plot(
        "Compression",
        "Time of the host for the compressions of a prompt.",
        "s",
        (
            Query(quantile(0.5, "vllm:budgetkv_compression_seconds"), "half"),
            Query(quantile(0.95, "vllm:budgetkv_compression_seconds"), "95 of 100"),
        ),
    ),
    Plot(
        "Pool",
        "Share of the pool's blocks that is held, as vLLM counts it.",
        "percentunit",
        (Query(f"max by (engine) (vllm:kv_cache_usage_perc{{{OURS}}})", "engine {{engine}}"),),
    ),
    Plot(
        "Requests now",
        "A look-ahead counts as its waiting request.",
        "short",
        (
            Query(f"sum(vllm:num_requests_running{{{OURS}}})", "running"),
            Query(f"sum(vllm:num_requests_waiting{{{OURS}}})", "waiting"),
            Query(rate("vllm:num_preemptions_total", "model_name"), "preempted a second"),
        ),
    ),
    Plot(
        "Prompt tokens that were not computed",
        "Taken over from cached blocks or from host memory.",
        "short",
        (Query(rate("vllm:prompt_tokens_cached_by_source_total", "source"), "{{source}}"),),
    ),
    Plot(
        "Host memory",
        "Blocks that requests hold, and those in which a prompt may find its beginning.",
        "short",
        (Query(f"sum by (state) (vllm:budgetkv_host_blocks{{{OURS}}})", "{{state}}"),),
    ),
    Plot(
        "Fetched from host memory",
        "Bytes of one rank in a decode step of a request.",
        "bytes",
        (
            Query(
                f"{rate('vllm:budgetkv_moved_bytes_total', 'model_name')} / "
                f"{rate('vllm:budgetkv_recall_steps_total', 'model_name')}",
                "bytes a step",
            ),
        ),
    ),
    Plot(
        "Found where the last step left it",
        "Share of the tokens that heads looked for in host memory and had not to be fetched.",
        "percentunit",
        (
            Query(
                "1 - sum by (model_name) (rate(vllm:budgetkv_recalled_tokens_total"
                f'{{{OURS}, kind="moved"}}[{INTERVAL}])) / '
                f"{rate('vllm:budgetkv_recalled_tokens_total', 'model_name')}",
                "hits",
            ),
        ),
    ),
    Plot(
        "Time to first token",
        "",
        "s",
        (
            Query(quantile(0.5, "vllm:time_to_first_token_seconds"), "half"),
            Query(quantile(0.95, "vllm:time_to_first_token_seconds"), "95 of 100"),
        ),
    ),
)


def panel_of(plot: Plot) -> Panel:
    panel = Panel().title(plot.title).description(plot.meaning).unit(plot.unit).datasource(SOURCE)
    for letter, query in zip("ABCDEF", plot.queries, strict=False):
        target = Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        panel = panel.with_target(target)
    return panel.height(8).span(12)


def dashboard() -> Dashboard:
    """All panels, two in a row, with a choice of data source and model."""
    source = DatasourceVariable("datasource").type("prometheus").label("Prometheus")
    model = (
        QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query("label_values(vllm:budgetkv_requests_total, model_name)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
    )
    built = Dashboard("vLLM: KV quotas").uid("vllm-budgetkv").tags(["vllm"]).refresh("10s")
    built = built.time("now-30m", "now").with_variable(source).with_variable(model)
    for plot in PLOTS:
        built = built.with_panel(panel_of(plot))
    return built


def as_json() -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_json())
