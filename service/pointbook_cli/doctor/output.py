"""The findings of `pointbook doctor` as a page of text, or as JSON."""

import json
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pointbook_cli.doctor.findings import Finding, Level
from pointbook_cli.terminal import count_of, escape_unprintable, print_unpadded, table_console

MARKS = {Level.OK: "✓", Level.WARNING: "!", Level.PROBLEM: "✗", Level.UNCHECKED: "-"}
ASCII_MARKS = MARKS | {Level.OK: "ok", Level.PROBLEM: "x"}
STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red", Level.UNCHECKED: "dim"}


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding with its remedy below, and the counts."""
    console = table_console()
    marks = MARKS if "✓".encode(console.encoding, "ignore") else ASCII_MARKS
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text(marks[finding.level], style=STYLES[finding.level])
        table.add_row(mark, finding.check, Text(escape_unprintable(finding.text)))
        if finding.remedy:
            table.add_row("", "", Text(f"{finding.remedy}; see {finding.page}"))
    print_unpadded(console, table)
    console.print()
    console.print(summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    """Return the numbers of problems and warnings as text."""
    counts = Counter(finding.level for finding in findings)
    problems = count_of(counts[Level.PROBLEM], "problem", "problems")
    return f"{problems}, {count_of(counts[Level.WARNING], 'warning', 'warnings')}."


def to_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one JSON document."""
    counts = Counter(finding.level for finding in findings)
    document = {
        "problems": counts[Level.PROBLEM],
        "warnings": counts[Level.WARNING],
        "findings": [
            {
                "check": finding.check,
                "level": finding.level,
                "text": finding.text,
                "remedy": finding.remedy,
                "page": finding.page,
            }
            for finding in findings
        ],
    }
    return json.dumps(document, indent=2)


def exit_code(findings: Sequence[Finding], *, is_strict: bool) -> int:
    """Return 1 if there are problems, or also warnings in the strict mode, and else 0."""
    bad = {Level.PROBLEM, Level.WARNING} if is_strict else {Level.PROBLEM}
    return int(any(finding.level in bad for finding in findings))
