"""Alert rules, their tests, the dashboard, the runbook and the metrics agree."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pointbook_cli.services.worker_metrics import WORKER, WorkerMetrics
from pointbook_common.metric_registry import MetricDefinition
from pointbook_server.metrics import Metrics as ServerMetrics
from shopline_shim.metrics import Metrics as ShimMetrics
from support.alert_rules import (
    DASHBOARD,
    ROOT,
    RULE_TESTS,
    RULES,
    expressions,
    load_panels,
    load_rules,
    names_in,
    rules_reached,
    shorten,
    write_split_tests,
)

PROMTOOL = shutil.which("promtool")
RUNBOOK = ROOT / "docs" / "runbook.md"
PROMTOOL_SECONDS_MAX = 300.0
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: it comes with Prometheus")
TARGET_LABELS = {"job", "instance", WORKER}
"""The labels that each sample has by its target, and by its worker."""
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
PROCESS_METRICS = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
}
ALERT_LABELS = {"alertname", "alertstate", "severity"}
"""The labels of Prometheus's own metric ALERTS, beside those of the alert."""
ALERTS = [rule for rule in load_rules() if "alert" in rule]
ALERT_NAMES = {rule["alert"] for rule in ALERTS}
LABEL_OF_TEMPLATE = re.compile(r"\$labels\.(\w+)")
SECTION = re.compile(r"^## (Pointbook\w+)$", re.MULTILINE)
GROUPED_BY = re.compile(r"\bby \(([^)]*)\)")


def definitions() -> list[MetricDefinition]:
    """Return the definitions of all processes' metrics."""
    return [*ServerMetrics().definitions, *ShimMetrics().definitions, *WorkerMetrics(1).definitions]


def known_metrics() -> dict[str, set[str]]:
    """Return the labels of each series that Prometheus stores, by its name.

    A target's label wins: the metric's own label of that name gets the prefix `exported_`.
    """
    known = dict.fromkeys((*PROCESS_METRICS, "up"), TARGET_LABELS) | {"ALERTS": TARGET_LABELS | ALERT_LABELS}
    for each in definitions():
        own = {f"exported_{label}" if label in {"job", "instance"} else label for label in each.labels}
        for suffix in SUFFIXES.get(each.kind, ("",)):
            more = {"le"} if suffix == "_bucket" else set()
            known.setdefault(each.name + suffix, set()).update(own | more | TARGET_LABELS)
    for rule in load_rules():
        if "record" in rule:
            known[rule["record"]] = labels_of_result(rule["expr"])
    return known


def labels_of_result(expression: str) -> set[str]:
    """Return the labels that group an expression, or else those of its metrics."""
    grouped = GROUPED_BY.findall(expression)
    if grouped:
        return {label.strip() for labels in grouped for label in labels.split(",")} - {"le"}
    known = known_metrics()
    return set().union(*(known[name] for name in names_in(expression).metrics))


def run_promtool(*arguments: str | Path) -> None:
    """Run promtool, and check that it succeeds."""
    assert PROMTOOL is not None
    finished = subprocess.run(
        [PROMTOOL, *arguments],
        cwd=RULES.parent,
        # Otherwise it spends a fifth of its time on garbage.
        env={**os.environ, "GOGC": "400"},
        capture_output=True,
        text=True,
        timeout=PROMTOOL_SECONDS_MAX,
        check=False,
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_promtool
def test_rules_are_valid() -> None:
    run_promtool("check", "rules", RULES)


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    run_promtool("test", "rules", *write_split_tests(tmp_path))


@needs_promtool
@pytest.mark.soak  # All rules in each test cost five times the processor time of those that a test reaches.
def test_alerts_fire_when_they_should_beside_all_rules() -> None:
    run_promtool("test", "rules", RULE_TESTS)


def test_a_test_of_promtool_reaches_the_rules_of_its_series_and_checks_and_what_these_read() -> None:
    rules = [
        {"record": "a:rate", "expr": "rate(a[5m])"},
        {"alert": "OfSeries", "expr": "a:rate > b:rate"},
        {"record": "b:rate", "expr": "rate(b[5m])"},
        {"alert": "Twice", "expr": "c > 1"},
        {"alert": "Twice", "expr": "d:rate > 1"},
        {"record": "d:rate", "expr": "rate(d[5m])"},
        {"alert": "Other", "expr": "absent(e)"},
    ]
    series = [{"series": 'a{job="x"}', "values": "0+1x10"}]
    checks = [{"expr": 'ALERTS{alertname="Twice"}', "eval_time": "5m"}]

    reached = rules_reached({"input_series": series, "promql_expr_test": checks}, rules)

    assert reached == {"a:rate", "OfSeries", "b:rate", "Twice", "d:rate"}


def test_metrics_of_rules_and_dashboard_exist() -> None:
    known = known_metrics()
    unknown = {(place, name) for place, text in expressions() for name in names_in(text).metrics if name not in known}

    assert unknown == set()


def test_labels_of_rules_and_dashboard_exist() -> None:
    known = known_metrics()

    def unknown(text: str) -> set[str]:
        names = names_in(text)
        return set(names.labels) - set().union(*(known[name] for name in names.metrics))

    assert {(place, label) for place, text in expressions() for label in unknown(text)} == set()


def test_names_are_found_in_every_part_of_an_expression() -> None:
    names = names_in(
        'histogram_quantile(0.9, sum by (le, kind) (rate(a_bucket{x="y} by (z)", w!~"$v"}[5m] offset 1h)))'
        " / on (job) group_left (team) b:c > 0.5 and 0 * (d or e unless f) or vector(3)"
    )

    assert names.metrics == {"a_bucket", "b:c", "d", "e", "f"}
    assert names.labels == {"le", "kind", "x", "w", "job", "team"}


def test_durations_are_shortened_and_thresholds_stay() -> None:
    text = "expr: rate(a:rate5m[2m]) > 6 * 3600 and b offset 1h\nfor: 15m\nrecord: c:rate1d\ninterval: 30s\n"

    assert shorten(text, 60) == (
        "expr: rate(a:rate5m[2000ms]) > 6 * 3600 and b offset 60000ms\nfor: 15000ms\n"
        "record: c:rate1d\ninterval: 500ms\n"
    )


def test_alerts_have_a_severity_and_texts() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, rule["alert"]


def test_labels_that_texts_show_are_in_the_alert() -> None:
    unknown = {
        (rule["alert"], label)
        for rule in ALERTS
        for text in rule["annotations"].values()
        for label in LABEL_OF_TEMPLATE.findall(text)
        if label not in labels_of_result(rule["expr"])
    }

    assert unknown == set()


def test_every_alert_links_to_its_section_of_the_runbook() -> None:
    sections = SECTION.findall(RUNBOOK.read_text())

    assert len(sections) == len(set(sections))
    assert set(sections) == ALERT_NAMES
    for rule in ALERTS:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert ROOT / page == RUNBOOK
        assert anchor == rule["alert"].lower()


def test_every_alert_has_tests_of_promtool_in_which_it_fires_and_does_not() -> None:
    checks = [check for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for check in test["promql_expr_test"]]

    def tested(*, fires: bool) -> set[tuple[str, str]]:
        return {
            (match.group(1), severity)
            for check in checks
            if (match := re.search(r'alertname="(\w+)"', check["expr"])) and bool(check.get("exp_samples")) == fires
            for severity in re.findall(r'severity="(\w+)"', str(check.get("exp_samples"))) or [""]
        }

    assert tested(fires=True) == {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}
    assert {name for name, _ in tested(fires=False)} == ALERT_NAMES


def test_panels_are_described_and_have_units() -> None:
    panels = load_panels()
    titles = [panel["title"] for panel in panels]

    assert len(titles) == len(set(titles))
    for panel in panels:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"]), panel["title"]


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]

    assert len(ids) == len(set(ids))
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_every_alert_is_linked_by_a_panel_and_links_lead_to_sections() -> None:
    linked = {link["url"] for panel in load_panels() for link in panel["links"]}

    assert linked == {f"${{runbook}}#{name.lower()}" for name in ALERT_NAMES}


def test_the_table_of_symptoms_names_panels_and_alerts() -> None:
    text = RUNBOOK.read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \[(\w+)\]\(#(\w+)\)[^|]*\|", text, re.MULTILINE)
    titles = {panel["title"] for panel in load_panels()}

    assert len(rows) >= 10
    for symptom, panels, alert, anchor in rows:
        assert set(panels.split(", ")) <= titles, symptom
        assert alert in ALERT_NAMES, symptom
        assert anchor == alert.lower(), symptom
