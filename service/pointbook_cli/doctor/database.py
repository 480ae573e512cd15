"""Checks of the database, each with a time limit.

If one cannot be made, the others still are, as long as the database responds.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

from pointbook_cli.doctor import records
from pointbook_cli.doctor.findings import Finding, Page, ok, problem, some_of, unchecked, warning
from pointbook_common.durations import SECOND_MS
from pointbook_common.errors import SettingError
from pointbook_server.db.clock_skew import REMEDY, SYSTEM_CLOCK, ClockState, Sample
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.inspection import ServerState, inspect_server
from pointbook_server.db.schema import SchemaError, check_schema
from pointbook_server.errors import DatabaseDefectError, PointbookError
from pointbook_server.settings import ServerSettings

CHECK_SECONDS = 5.0
"""The most time for one check."""
MAJOR_VERSION_MIN = 15
RESERVED_CONNECTIONS = 2
"""The connections of a server process besides its pool: for health checks and for token look-ups."""
CLOCK_SAMPLES = 3
NAME = "database"
NO_RESPONSE = "the database does not respond"

Check = Callable[[Connection], Awaitable[Iterable[Finding]]]


class DatabaseCheck(NamedTuple):
    """A check that reads the database, and the name of its findings.

    A snapshot is read-only, so that the check of the schema, which finds read-only databases, needs none.
    """

    name: str
    run: Check
    has_snapshot: bool = True

    async def run_on(self, database: Database) -> Iterable[Finding]:
        """Run the check. Raises DATABASE_UNAVAILABLE."""
        if self.has_snapshot:
            return await database.snapshot(self.run)
        async with database.autocommit() as connection:
            return await self.run(connection)


async def check_database(settings: ServerSettings | None, silent_hours: float) -> list[Finding]:
    """Check the database in the settings, and what Pointbook stores in it."""
    if settings is None or settings.database_url is None:
        cause = "the settings are wrong" if settings is None else "POINTBOOK_DATABASE_URL is not set or wrong"
        return [unchecked(name, cause) for name in (NAME, *(check.name for check in _checks(None, silent_hours)))]
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        return [finding async for finding in _run_all(database, settings, silent_hours)]
    finally:
        await database.dispose()


async def _run_all(database: Database, settings: ServerSettings, silent_hours: float) -> AsyncIterator[Finding]:
    """Run all checks, until the database does not respond any more."""
    first = DatabaseCheck(NAME, lambda connection: _check_server(connection, settings))
    responds = True
    for check in (first, *_checks(settings, silent_hours)):
        if not responds:
            yield unchecked(check.name, NO_RESPONSE)
            continue
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                findings = await check.run_on(database)
        except (TimeoutError, PointbookError, SettingError) as error:
            responds = check is not first and await _responds(database)
            if responds:
                yield _too_slow(check.name, _cause(error))
                continue
            yield _unreachable(_cause(error))
            if check is not first:
                yield unchecked(check.name, NO_RESPONSE)
        except DatabaseDefectError as error:
            yield unchecked(check.name, f"the database refuses the statement ({error})")
        else:
            for finding in findings:
                yield finding


def _cause(error: TimeoutError | PointbookError | SettingError) -> str:
    """Return why a check failed, as one line."""
    if isinstance(error, TimeoutError):
        return f"no response within {CHECK_SECONDS:g} s"
    cause = error.__cause__ if isinstance(error, PointbookError) else None
    text = f"{type(cause).__name__}: {cause}".removesuffix(": ") if cause else str(error)
    return " ".join(text.split())


def _checks(settings: ServerSettings | None, silent_hours: float) -> tuple[DatabaseCheck, ...]:
    """Return the checks after the first, in the order of the report."""
    return (
        DatabaseCheck("schema", _check_schema, has_snapshot=False),
        DatabaseCheck("clock", _check_clock),
        DatabaseCheck("tokens", records.check_tokens),
        DatabaseCheck("quarantine", lambda connection: records.check_quarantine(connection, settings)),
        DatabaseCheck("stores", lambda connection: records.check_stores(connection, silent_hours)),
        DatabaseCheck("drift", records.check_drift),
        DatabaseCheck("holds", records.check_holds),
        DatabaseCheck("erasures", records.check_erasures),
    )


def _unreachable(text: str) -> Finding:
    remedy = "start the database, or correct POINTBOOK_DATABASE_URL"
    return problem(NAME, f"the database cannot be used: {text}", remedy, Page.HEALTH)


def _too_slow(name: str, text: str) -> Finding:
    remedy = "look for long transactions and locks in pg_stat_activity, then run the command again"
    return warning(name, f"not checked: {text}", remedy, Page.HEALTH)


async def _responds(database: Database) -> bool:
    """Return whether the database responds to a statement of another kind."""
    with contextlib.suppress(TimeoutError, PointbookError, DatabaseDefectError):
        async with asyncio.timeout(CHECK_SECONDS), database.autocommit() as connection:
            await SYSTEM_CLOCK.read_database(connection)
            return True
    return False


async def _check_server(connection: Connection, settings: ServerSettings) -> list[Finding]:
    """Check the server's version and its settings."""
    started = time.monotonic()
    await SYSTEM_CLOCK.read_database(connection)
    latency_ms = (time.monotonic() - started) * SECOND_MS
    state = await inspect_server(connection)
    found = [*_server_findings(state, settings)]
    return found or [ok(NAME, f"PostgreSQL {state.version}, {latency_ms:.1f} ms a statement")]


def _server_findings(state: ServerState, settings: ServerSettings) -> Iterator[Finding]:
    if state.major_version < MAJOR_VERSION_MIN:
        text = f"PostgreSQL {state.version} is too old"
        yield problem(NAME, text, f"upgrade it to version {MAJOR_VERSION_MIN} or later", Page.DATABASE)
    if state.is_read_only:
        text = "the database is read-only: a standby, or default_transaction_read_only"
        yield problem(NAME, text, "name the primary in POINTBOOK_DATABASE_URL", Page.HEALTH)
    needed = settings.workers * (settings.database_pool_size + RESERVED_CONNECTIONS)
    free = state.connections_max - state.others_in_use
    if needed > free:
        text = (
            f"the server's {settings.workers} x ({settings.database_pool_size} + {RESERVED_CONNECTIONS}) connections "
            f"do not fit into the {max(free, 0)} that others leave of {state.connections_max}"
        )
        yield warning(NAME, text, "raise max_connections, or lower POINTBOOK_DATABASE_POOL_SIZE", Page.DATABASE)
    if not state.has_autovacuum or state.unvacuumed:
        text = f"autovacuum is off{' for ' + some_of(list(state.unvacuumed)) if state.has_autovacuum else ''}"
        yield problem(NAME, text, "turn it on: every event leaves an old version of its account", Page.DATABASE)


async def _check_schema(connection: Connection) -> list[Finding]:
    """Check tables, privileges and revision."""
    try:
        stored = await check_schema(connection)
    except SchemaError as error:
        return [problem("schema", str(error), "see the cause", Page.HEALTH)]
    return [ok("schema", f"revision {stored.number}, the role has all privileges")]


async def _check_clock(connection: Connection) -> list[Finding]:
    """Compare this machine's clock with the database's."""
    samples = [await _sample(connection) for _ in range(CLOCK_SAMPLES)]
    best = min(samples, key=lambda sample: sample.tolerance_ms)
    direction = "ahead of" if best.ahead_ms > 0 else "behind"
    text = f"this machine's clock is {abs(best.ahead_ms) / SECOND_MS:.1f} s {direction} the database's"
    if best.least is ClockState.WRONG:
        return [problem("clock", f"{text}: a server here refuses all calls", REMEDY, Page.CLOCKS)]
    if best.least is ClockState.SKEWED:
        return [warning("clock", f"{text}: a server here releases and deletes nothing", REMEDY, Page.CLOCKS)]
    return [ok("clock", "agrees with the database's")]


async def _sample(connection: Connection) -> Sample:
    """Compare the clocks once.

    The database reads its clock at some moment within the round trip.
    """
    started_ms, started = SYSTEM_CLOCK(), time.monotonic()
    database_ms = await SYSTEM_CLOCK.read_database(connection)
    tolerance_ms = (time.monotonic() - started) * SECOND_MS / 2
    return Sample(database_ms, started_ms + tolerance_ms - database_ms, tolerance_ms)
