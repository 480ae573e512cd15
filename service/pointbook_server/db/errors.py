"""Errors of the database, and the translation of driver errors into them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import asyncpg
from sqlalchemy.exc import DBAPIError

from pointbook_server.errors import RETRY_AFTER_SECONDS, DatabaseDefectError, PointbookError
from pointbook_server.reasons import Reason

DEADLOCK_SQLSTATE = "40P01"
CONFLICT_SQLSTATES = frozenset({"40001", DEADLOCK_SQLSTATE, "22012"})
"""Serialization failure, deadlock, and division by zero: the transaction had no effect and may succeed when retried.

Our statements divide by zero on purpose, to abort themselves when another transaction changed what they rely on.
"""
FOREIGN_KEY_SQLSTATE = "23503"
STORE_KEYS = frozenset({"fk_points_accounts_stores", "fk_store_erasures_stores"})
"""Foreign keys to stores, which can be released at any time: the retry finds that the store is gone."""
SHARD_SUFFIX = re.compile(r"_\d+$")
"""What Citus appends to the name of a constraint on each shard."""
LOCK_TIMEOUT_SQLSTATE = "55P03"
"""The database is too busy. Not retried, because other transactions are waiting for the same lock."""
READ_ONLY_SQLSTATE = "25006"
DISK_FULL_SQLSTATE = "53100"
UNAVAILABLE_SQLSTATES = ("08", READ_ONLY_SQLSTATE, "28", "3D", "53", "57")
"""Prefixes of the SQLSTATEs that mean DATABASE_UNAVAILABLE.

Connection errors, a read-only standby, refused logins, a missing database, lack of resources, operator intervention.
"""


class RetryTransactionError(PointbookError):
    """Raised inside a transaction to roll it back and run it again.

    Another transaction has changed the same data. Callers get it after too many attempts. `sqlstate` is empty if this
    server noticed the change itself.
    """

    def __init__(self, sqlstate: str = "") -> None:
        self.sqlstate = sqlstate
        super().__init__(
            Reason.TRANSACTION_CONFLICT,
            "Other calls kept changing the same data; retry.",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )


class LoginRefusedError(ConnectionRefusedError):
    """The database refused a login.

    Its SQLSTATE would mean a defect of this server if a statement had caused it.
    """

    def __init__(self, cause: asyncpg.PostgresError) -> None:
        super().__init__(str(cause))
        self.sqlstate = sqlstate_of(cause)


@contextmanager
def database_errors(on_unavailable: Callable[[BaseException], None] = lambda _cause: None) -> Iterator[None]:
    """Translate the driver's errors into errors of this package.

    None of them quotes a row or a parameter. `on_unavailable` is called with each driver error that becomes
    DATABASE_UNAVAILABLE.
    """
    try:
        yield
    except DBAPIError as error:
        # SQLAlchemy wraps the driver's error twice.
        _raise_translated(error.orig.__cause__ if error.orig else None, on_unavailable)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        _raise_translated(error, on_unavailable)
    except (OSError, TimeoutError) as error:
        on_unavailable(error)
        raise database_unavailable() from error


def sqlstate_of(cause: BaseException | None) -> str:
    """Return the SQLSTATE of a driver error, or an empty string."""
    return str(getattr(cause, "sqlstate", None) or "")


def _raise_translated(cause: Any, on_unavailable: Callable[[BaseException], None]) -> NoReturn:
    """Raise the translation of a driver error.

    A defect omits its cause, which would be logged with row values.
    """
    error = _translated(cause)
    if isinstance(error, PointbookError) and error.reason is Reason.DATABASE_UNAVAILABLE:
        on_unavailable(cause)
    raise error from (None if isinstance(error, DatabaseDefectError) else cause)


def _translated(cause: Any) -> Exception:
    """Return our error for a driver error."""
    sqlstate = sqlstate_of(cause)
    constraint = SHARD_SUFFIX.sub("", getattr(cause, "constraint_name", None) or "")
    is_released = sqlstate == FOREIGN_KEY_SQLSTATE and constraint in STORE_KEYS
    # A migration changed the result of a prepared statement; the next attempt prepares it again.
    is_outdated = isinstance(cause, (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError))
    if sqlstate in CONFLICT_SQLSTATES or is_outdated or is_released:
        return RetryTransactionError(sqlstate)
    if isinstance(cause, asyncpg.DataError):
        return DatabaseDefectError("a statement got a parameter of the wrong type")
    # The driver raises these when the database ends a connection just as a statement starts on it.
    is_driver = isinstance(cause, (asyncpg.InterfaceError, asyncpg.InternalClientError))
    if is_driver or sqlstate == LOCK_TIMEOUT_SQLSTATE or sqlstate.startswith(UNAVAILABLE_SQLSTATES):
        return database_unavailable()
    return DatabaseDefectError(f"{sqlstate}: {cause.args[0]}", constraint)


def database_unavailable() -> PointbookError:
    """Return the error for a database that is unavailable or too busy."""
    return PointbookError(
        Reason.DATABASE_UNAVAILABLE,
        "The database is not available right now; retry.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
