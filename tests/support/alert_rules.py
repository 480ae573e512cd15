"""Prometheus rules and the dashboard in deploy/, and the names that they use."""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RULE_TESTS = ROOT / "deploy" / "prometheus" / "rules_test.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "pointbook.json"

_TOKEN = re.compile(
    r"""
    "(?:[^"\\]|\\.)*"                    # a string
    | \[[^\]]*\]                         # a range
    | [A-Za-z_:][\w:]*                   # a name
    | \d[\w.]*                           # a number or a duration
    | [{}()]
    """,
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = _GROUPING | {"and", "or", "unless", "offset", "bool"}
_AFTER_FUNCTIONS = {"(", "by", "without"}
_CHECKED = re.compile(r'alertname="(\w+)"')
_DURATION = re.compile(r"(\[|\boffset )(\d+)([smhd])\b|\b(for|interval): (\d+)([smhd])\b")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True)
class Names:
    """The metrics of an expression, and all labels that select or group them."""

    metrics: frozenset[str]
    labels: frozenset[str]


@functools.cache
def load_rules() -> list[dict[str, Any]]:
    """Return all rules in their order."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def name_of(rule: dict[str, Any]) -> str:
    """Return the name of an alert, or of the series that a rule records."""
    return str(rule.get("alert") or rule["record"])


def load_panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels without its rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def names_in(expression: str) -> Names:
    """Return the names in a PromQL expression.

    Variables of Grafana may be in its strings and ranges.
    """
    tokens = _TOKEN.findall(expression)
    metrics, labels = set(), set()
    end_of_labels = ""
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        is_name = token[0].isalpha() or token[0] in "_:"
        if token == end_of_labels:
            end_of_labels = ""
        elif end_of_labels:
            labels |= {token} if is_name else set()
        elif token == "{":
            end_of_labels = "}"
        elif token in _GROUPING and following == "(":
            end_of_labels = ")"
        elif is_name and token not in _WORDS and following not in _AFTER_FUNCTIONS:
            metrics.add(token)
    return Names(frozenset(metrics), frozenset(labels))


def rules_reached(test: dict[str, Any], rules: list[dict[str, Any]]) -> frozenset[str]:
    """Return the names of the rules that a test of promtool reaches.

    The test checks them, or has series on which their results depend. With them come the rules that record what they
    read. All others read series that the test does not have.
    """
    reads: defaultdict[str, set[str]] = defaultdict(set)
    for rule in rules:
        reads[name_of(rule)] |= names_in(rule["expr"]).metrics
    reached = {each["series"].partition("{")[0] for each in test["input_series"]}
    for check in test["promql_expr_test"]:
        reached |= names_in(check["expr"]).metrics | set(_CHECKED.findall(check["expr"]))
    before = None
    while reached != before:
        before = set(reached)
        reached |= {name for name, read in reads.items() if read & before}
        reached |= set().union(*(read for name, read in reads.items() if name in before))
    return frozenset(reached & set(reads))


def write_split_tests(folder: Path) -> list[Path]:
    """Write the tests of promtool into files by the rules that they reach.

    Returns the files. promtool evaluates all rules of a file at each minute of each test, of which most have nothing
    to read.
    """
    described, rules = yaml.safe_load(RULE_TESTS.read_text()), yaml.safe_load(RULES.read_text())
    all_rules = [rule for group in rules["groups"] for rule in group["rules"]]
    tests_by_rules: defaultdict[frozenset[str], list[dict[str, Any]]] = defaultdict(list)
    for test in described["tests"]:
        tests_by_rules[rules_reached(test, all_rules)].append(test)
    files = []
    for number, (names, tests) in enumerate(tests_by_rules.items()):
        groups = [
            {**group, "rules": [rule for rule in group["rules"] if name_of(rule) in names]} for group in rules["groups"]
        ]
        (folder / f"rules_{number}.yml").write_text(yaml.safe_dump({**rules, "groups": groups}))
        files.append(folder / f"rules_test_{number}.yml")
        files[-1].write_text(yaml.safe_dump({**described, "rule_files": [f"rules_{number}.yml"], "tests": tests}))
    return files


def shorten(text: str, factor: int) -> str:
    """Return rules with ranges, offsets, `for` and `interval` divided by a factor.

    Nothing else changes: thresholds stay, even those in seconds.
    """

    def replace(match: re.Match[str]) -> str:
        opening, count, unit, field, field_count, field_unit = match.groups()
        milliseconds = int(count or field_count) * _UNIT_MS[unit or field_unit] // factor
        return f"{opening}{milliseconds}ms" if opening else f"{field}: {milliseconds}ms"

    return _DURATION.sub(replace, text)


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each expression of the rules and the dashboard."""
    for rule in load_rules():
        yield name_of(rule), rule["expr"]
    for panel in load_panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
