"""Prometheus rules and the dashboard in deploy/, and the names that they use."""

import functools
import json
import re
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
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in load_panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
