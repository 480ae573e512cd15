"""Structured logs: JSON lines for machines, colours for a terminal. They hold no personal data and no locals."""

import logging
import sys
from contextvars import ContextVar

import structlog

current_call: ContextVar[dict[str, str] | None] = ContextVar("current_call", default=None)
"""What every line that is logged inside a call tells of the call."""


def add_call(_logger: object, _name: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add to a line what is to be told of the call that it belongs to."""
    return {**(current_call.get() or {}), **line}


def configure_logs(level: str, *, json: bool) -> None:
    """Set up logging for this process, the standard library's included, on standard error."""
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
    # These tell of every request at a level that is not theirs to choose.
    for name in ("asyncio", "httpx", "httpcore", "uvicorn", "alembic"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
