"""What a check found: its level, its text, and the remedy."""

from dataclasses import dataclass
from enum import StrEnum

EXAMPLES_MAX = 5
"""The most items that a finding names."""


class Level(StrEnum):
    """How bad a finding is.

    An unchecked one depends on something that failed or is not set up here.
    """

    OK = "OK"
    WARNING = "WARNING"
    PROBLEM = "PROBLEM"
    UNCHECKED = "UNCHECKED"


class Page(StrEnum):
    """The pages to which findings refer."""

    ACCESS = "docs/api.md#access"
    CERTIFICATES = "docs/configuration.md#files"
    CLOCKS = "docs/operations.md#clocks"
    CODE_KEYS = "docs/operations.md#rotating-keys"
    DATABASE = "docs/configuration.md#database-connection"
    DRIFT = "docs/points.md#drift"
    ERASURES = "docs/erasing-stores.md#watch-the-requests"
    EXPIRY = "docs/configuration.md#expiry"
    HEALTH = "docs/operations.md#health"
    QUARANTINE = "docs/webhooks.md#work-through-it"
    QUARANTINE_KEYS = "docs/webhooks.md#encryption-of-the-quarantine"
    QUARANTINE_LIMITS = "docs/webhooks.md#limits"
    SETTINGS = "docs/configuration.md#settings"
    SETTLEMENT = "docs/redemption.md#settlement"
    START = "docs/operations.md#start"
    SYMPTOMS = "docs/troubleshooting.md#symptoms"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check; `remedy` says what to do, and `page` where to read more.

    No part of it contains a secret or personal data.
    """

    check: str
    level: Level
    text: str
    remedy: str = ""
    page: Page | None = None


def ok(check: str, text: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, remedy: str, page: Page) -> Finding:
    """Return a finding that needs attention, though everything works now."""
    return Finding(check, Level.WARNING, text, remedy, page)


def problem(check: str, text: str, remedy: str, page: Page) -> Finding:
    """Return a finding that keeps something from working."""
    return Finding(check, Level.PROBLEM, text, remedy, page)


def unchecked(check: str, cause: str) -> Finding:
    """Return the finding that a check could not be made, and why."""
    return Finding(check, Level.UNCHECKED, f"not checked: {cause}")


def some_of(names: list[str]) -> str:
    """Return the first few names, and the number of the others."""
    more = len(names) - EXAMPLES_MAX
    return ", ".join(names[:EXAMPLES_MAX]) + (f" and {more:,} more" if more > 0 else "")
