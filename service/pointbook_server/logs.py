"""Structured logs: JSON lines, or colors on a terminal.

They contain no personal data and no local variables.
"""

import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

from pointbook_common.tracing import Span


@dataclass(slots=True)
class CallRecord:
    """What is known about a running call, for its log lines."""

    method: str
    request_id: str
    started_at: float
    """By the monotonic clock."""
    queue_seconds: float = 0.0
    """How long its items have waited for batches; a time in which several waited counts once."""
    span: Span | None = None
    """The span of the call, if it is traced."""
    _waited_until: float = 0.0

    def add_wait(self, since: float, until: float) -> None:
        """Add a wait that ended just now, between times of the monotonic clock."""
        self.queue_seconds += until - max(since, self._waited_until)
        self._waited_until = until


current_call: ContextVar[CallRecord | None] = ContextVar("current_call", default=None)
"""The call that each log line inside it belongs to."""


def add_call(_logger: object, _name: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Return a log line with the ids of the current call, and its method."""
    call = current_call.get()
    if call is None:
        return line
    trace = {} if call.span is None else {"trace_id": call.span.trace_id, "span_id": call.span.span_id}
    return {"request_id": call.request_id, "method": call.method, **trace, **line}


def configure_logs(level: str, *, json: bool | None = None) -> None:
    """Configure logging to standard error, including that of the standard library.

    By default, a terminal gets colors, and everything else JSON.
    """
    if json is None:
        json = not sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        add_call,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json:
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    else:
        renderers = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # These libraries log every request at INFO.
    for name in ("asyncio", "httpx", "httpcore", "uvicorn", "alembic"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
