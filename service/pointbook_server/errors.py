"""The exceptions of the server, and errors that several capabilities raise."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pointbook_server.reasons import Reason

FIRST_REVISION_MAX = 10**15
RETRY_AFTER_SECONDS = 1.0
"""The delay that RetryInfo names where the cause usually passes within seconds."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """An invalid field: its path in the request, and what it must be."""

    field: str
    description: str


class UnusableDatabaseError(Exception):
    """The database cannot be used.

    The message is one line with the cause and the remedy, without personal data.
    """


class DatabaseDefectError(Exception):
    """The database refused a statement, which is a defect of this server.

    The message omits the database's DETAIL, which quotes rows and so personal data.
    """

    def __init__(self, message: str, constraint: str = "") -> None:
        super().__init__(message)
        self.constraint = constraint


class PointbookError(Exception):
    """An error that callers receive unchanged.

    No part of it contains a personal identifier or a secret.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds


REGISTERED_ELSEWHERE = "registered_elsewhere"
"""The metadata key that is set if another merchant has registered the store."""


def store_not_found(store_id: str, *, registered_elsewhere: bool = False) -> PointbookError:
    """Return the error for a store that this merchant has not registered."""
    metadata = {"store_id": store_id}
    if registered_elsewhere:
        metadata[REGISTERED_ELSEWHERE] = "true"
    return PointbookError(
        Reason.STORE_NOT_FOUND,
        "The merchant has no such store; register it with ProgramsService.PutStore.",
        metadata=metadata,
    )


def key_not_configured(setting: str, use: str) -> PointbookError:
    """Return the error for a call that needs a key that this server does not have."""
    return PointbookError(
        Reason.KEY_NOT_CONFIGURED,
        f"This server has no key {use}; set {setting}.",
        metadata={"setting": setting},
    )


def next_revision(revision: int, expected: int | None) -> int:
    """Return the next revision of a resource; 0 is that of one that does not exist.

    Raises STALE_ETAG if `expected` is another revision.
    """
    if expected is not None and expected != revision:
        raise PointbookError(Reason.STALE_ETAG, "The resource has changed since this etag was read; read it again.")
    return revision + 1


def first_revision() -> int:
    """Return a random first revision.

    It prevents the etag of a deleted resource from matching its successor.
    """
    return 1 + secrets.randbelow(FIRST_REVISION_MAX)
