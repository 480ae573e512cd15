"""The summary of all quarantines, for operators."""

from typing import NamedTuple

from pointbook_server.db.database import Connection
from pointbook_server.webhooks import queries
from pointbook_server.webhooks.model import QuarantineState


class ReasonCount(NamedTuple):
    """The webhooks that wait for the same reason, and the time of the oldest."""

    reason: str
    webhooks: int
    oldest_at_ms: int


class QuarantineUsage(NamedTuple):
    """The webhooks and bytes in a quarantine, replayed ones included."""

    owner_id: str
    webhooks: int
    bytes: int


async def read_waiting(connection: Connection) -> list[ReasonCount]:
    """Return the webhooks of all merchants that wait in quarantine, by reason."""
    rows = await connection.fetch(queries.COUNT_BY_REASON, {"state": QuarantineState.QUARANTINED.value})
    return sorted(ReasonCount(row.reason, row.webhooks, row.oldest_at_ms) for row in rows)


async def read_usage(connection: Connection) -> list[QuarantineUsage]:
    """Return how full each quarantine is that has a webhook."""
    rows = await connection.fetch(queries.LIST_USAGE)
    return [QuarantineUsage(row.merchant_id, row.webhooks, row.bytes) for row in rows]
