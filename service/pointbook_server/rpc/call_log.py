"""The log of calls: one line for each, or a count in a flood."""

from time import monotonic
from typing import NamedTuple

import grpc
import structlog

from pointbook_common.line_limit import LineLimit
from pointbook_server.access.model import current_principal
from pointbook_server.logs import CallRecord
from pointbook_server.reasons import REASONS

FLOOD_LINES_MAX = 10
"""How many calls of an outcome that comes in floods are logged singly per second."""
FLOOD_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED.name,
        grpc.StatusCode.PERMISSION_DENIED.name,
        grpc.StatusCode.RESOURCE_EXHAUSTED.name,
        grpc.StatusCode.UNAVAILABLE.name,
        grpc.StatusCode.DEADLINE_EXCEEDED.name,
        grpc.StatusCode.CANCELLED.name,
    }
)
"""The codes that can come in floods, because they cost the caller nothing."""

log = structlog.get_logger()


class Outcome(NamedTuple):
    """How a call ended: the name of a gRPC code, and a reason unless the code is OK."""

    code: str
    reason: str


OK = Outcome(grpc.StatusCode.OK.name, "")
CANCELLED = Outcome(grpc.StatusCode.CANCELLED.name, "CANCELLED")
"""The caller has cancelled the call before its deadline or disconnected, or the server is stopping."""
UNKNOWN_METHOD = Outcome(grpc.StatusCode.UNIMPLEMENTED.name, "UNKNOWN_METHOD")
OUTCOMES = {reason: Outcome(spec.grpc_code, reason.value) for reason, spec in REASONS.items()}
"""The outcomes of calls that end with an error, by its reason."""


class CallLog:
    """Logs calls that have ended.

    The first of each outcome are logged singly, and once a second the number of further ones.
    """

    def __init__(self, lines_per_second_max: int) -> None:
        self._lines_per_second_max = lines_per_second_max
        self._limit: LineLimit[Outcome] = LineLimit(self._lines_max, _write_rest)

    def write(self, call: CallRecord, outcome: Outcome) -> None:
        """Log a call that has just ended, now or together with others of this second."""
        if not self._limit.admits(outcome):
            return
        principal = current_principal.get(None)
        log.info(
            "call",
            code=outcome.code,
            reason=outcome.reason or None,
            duration_ms=round((monotonic() - call.started_at) * 1_000, 3),
            queue_ms=round(call.queue_seconds * 1_000, 3),
            token_id=None if principal is None else principal.token_id or None,
        )

    def _lines_max(self, outcome: Outcome) -> int:
        if outcome.code in FLOOD_CODES:
            return min(FLOOD_LINES_MAX, self._lines_per_second_max)
        return self._lines_per_second_max


def _write_rest(outcome: Outcome, count: int) -> None:
    log.info("more calls", code=outcome.code, reason=outcome.reason or None, count=count)
