"""Logs in the format of production, collected by a test."""

import contextlib
import io
import logging
from collections.abc import Iterator
from types import ModuleType

import pytest
import structlog

from pointbook_server.logs import configure_logs


@contextlib.contextmanager
def json_logs(*modules: ModuleType) -> Iterator[io.StringIO]:
    """Collect all log lines, down to DEBUG.

    `modules` are modules of this project that log. Their loggers keep the configuration of their first use, so they get
    new loggers while the block runs.
    """
    root, written = logging.getLogger(), io.StringIO()
    handlers, level, configuration = list(root.handlers), root.level, structlog.get_config()
    levels = {name: logging.getLogger(name).level for name in ("asyncio", "httpx", "httpcore", "uvicorn", "alembic")}
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.redirect_stderr(written):
            configure_logs("DEBUG", json=True)
        # Loggers first used during the block must not keep this configuration.
        structlog.configure(**{**structlog.get_config(), "cache_logger_on_first_use": False})
        for module in modules:
            patch.setattr(module, "log", structlog.get_logger())
        try:
            yield written
        finally:
            structlog.configure(**configuration)
            root.handlers[:] = handlers
            root.setLevel(level)
            for name, old in levels.items():
                logging.getLogger(name).setLevel(old)
