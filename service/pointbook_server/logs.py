"""Structured logs: JSON lines, or colors on a terminal.

They contain no personal data and no local variables.
"""

import logging
import sys
from contextvars import ContextVar

import structlog

current_call: ContextVar[dict[str, str] | None] = ContextVar("current_call", default=None)
"""The fields that each line logged inside a call gets."""


def add_call(_logger: object, _name: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Return a log line with the fields of the current call."""
    return {**(current_call.get() or {}), **line}


def configure_logs(level: str, *, json: bool) -> None:
    """Configure logging to standard error, including that of the standard library."""
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
