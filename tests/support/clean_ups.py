"""The clean-ups of a server's tables."""

from collections.abc import Iterable

from pointbook_server.retention import TableCleanUp
from pointbook_server.server import Server


def clean_up_of(clean_ups: Iterable[TableCleanUp], table: str) -> TableCleanUp:
    """Return the clean-up of a table."""
    return next(clean_up for clean_up in clean_ups if clean_up.name == table)


async def clean_up_codes(server: Server, now_ms: int) -> int:
    """Delete the old challenges, counters and missed calls; return how many rows."""
    tables = ("validation_challenges", "validation_tallies", "missed_calls")
    return sum([await clean_up_of(server.services.clean_ups, table).clean_up(now_ms) for table in tables])
