"""Every series that the Grafana dashboard asks for is one that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from streamdiff.serve.metrics import Meters

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana.json"


def test_every_query_names_a_series_of_ours() -> None:
    served = set(re.findall(r"^# TYPE (streamdiff_\w+)", Meters().text().decode(), re.MULTILINE))
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    asked = {name.removesuffix("_bucket") for query in queries for name in re.findall(r"streamdiff_\w+", query)}
    assert asked
    assert asked <= served


def test_no_series_is_left_out() -> None:
    served = re.findall(r"^# TYPE (streamdiff_\w+) (?:counter|gauge|histogram)", Meters().text().decode(), re.MULTILINE)
    shown = DASHBOARD.read_text()
    unseen = [name for name in served if name not in shown and not name.endswith(("_created", "_opened_total"))]
    assert unseen == []
