"""The outcomes of a file's lines."""

import time
from collections import Counter
from collections.abc import Sequence

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.points_file import RefusedLine, refused_line
from pointbook_cli.points_import.sorted_lines import RefusedLines, SortedLine
from pointbook_cli.terminal import count_of
from pointbook_client import PointbookError
from pointbook_client.retrying import UpdateResult

OUTCOMES = {
    points_pb2.APPLY_OUTCOME_APPLIED: "applied",
    points_pb2.APPLY_OUTCOME_LATE: "late",
    points_pb2.APPLY_OUTCOME_DUPLICATE: "duplicate",
}
ACCEPTED_BY_DRY_RUN = "fine"
REFUSED = "refused"


class LineCounts:
    """The number of lines by outcome; refused lines are stored."""

    def __init__(self, refused_lines: RefusedLines, outcomes: Sequence[str]) -> None:
        self._counts = Counter(dict.fromkeys([*outcomes, REFUSED], 0))
        self._refused_lines = refused_lines
        self._started = time.monotonic()

    @property
    def refused(self) -> int:
        """The number of refused lines."""
        return self._counts[REFUSED]

    def add_refused(self, line: RefusedLine) -> None:
        """Count and store a refused line."""
        self._counts[REFUSED] += 1
        self._refused_lines.add(line)

    def add_result(self, line: SortedLine, result: UpdateResult) -> None:
        """Count a line by the server's result."""
        if isinstance(result, PointbookError):
            pairs = ((violation.field, violation.description) for violation in result.violations)
            self.add_refused(refused_line(line.number, line.update.event_id, result.reason, result.message, pairs))
        else:
            self._counts[OUTCOMES[result.outcome]] += 1

    def add_accepted(self) -> None:
        """Count a line that a dry run accepts."""
        self._counts[ACCEPTED_BY_DRY_RUN] += 1

    def summary(self) -> str:
        """Return the counts and the rate as text."""
        lines = self._counts.total()
        rate = lines / max(time.monotonic() - self._started, 0.001)
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in self._counts.items())
        return f"{count_of(lines, 'line', 'lines')}, {rate:,.0f} a second: {counts}"
