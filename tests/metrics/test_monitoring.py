"""The dashboard is what its tool writes, and fits Grafana's schema; the rules do what they say."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import Counter

from tests.metrics.prometheus import MONITORING, program
from tools.dashboard import as_json
from vllm_budgetkv.metrics.meters import meters


def written() -> dict[str, Any]:
    return json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))


def test_the_dashboard_is_up_to_date() -> None:
    assert (MONITORING / "grafana.json").read_text(encoding="utf-8") == as_json()


def test_the_dashboard_fits_grafanas_schema() -> None:
    """Its own classes read the file, and every panel asks the data source that a user chooses."""
    read = Dashboard.from_json(written())
    assert read.uid == "vllm-budgetkv" and read.panels is not None
    names = {variable["name"] for variable in written()["templating"]["list"]}
    assert names == {"datasource", "model"}
    for panel in written()["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_document_lists_every_metric() -> None:
    """By the name that Prometheus shows."""
    text = (MONITORING.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(vllm:budgetkv_\w+)` \| (\w+) \|", text, re.MULTILINE))
    made = vars(meters()).values()
    expected = {
        (metric._name + ("_total" if isinstance(metric, Counter) else ""), metric._type)
        for metric in made
    }
    assert listed == expected


def test_the_rules_are_rules() -> None:
    command = [program("promtool"), "check", "rules", str(MONITORING / "alerts.yml")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "5 rules found" in found.stdout, found.stdout + found.stderr


def test_each_alert_is_raised_when_it_must() -> None:
    command = [program("promtool"), "test", "rules", "alerts_test.yml"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=MONITORING)
    assert found.returncode == 0, found.stdout + found.stderr
