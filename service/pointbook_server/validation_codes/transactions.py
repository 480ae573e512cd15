"""The transactions of one-time codes: each holds its locks in one order - challenges by customer, counts by subject."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any, TypeVar

from pointbook_server.clock import time_ordered_id
from pointbook_server.customers import phones
from pointbook_server.db.database import Connection, Database, RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.validation_codes import queries
from pointbook_server.validation_codes.commands import (
    Action,
    AuditRecord,
    Command,
    LockedState,
    day_of,
    subjects_of,
    told_of,
)
from pointbook_server.validation_codes.model import Challenge, Family, MissedCall, ValidationEvent
from pointbook_server.validation_codes.rate_limits import LONGEST_WINDOW_MS, SlidingWindowCounter

CLEAN_UP_COUNT = 1_000
"""How many rows of each table are deleted at a time."""
KEPT_MS = LONGEST_WINDOW_MS
"""How long what has ended is kept: no count reaches further, and the audit stays."""

T = TypeVar("T")


class ValidationCodeTransactions:
    """Reads and writes challenges and counts. A customer has at most one live challenge of each family."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, merchant_id: str, steps: Sequence[Command[T]], now_ms: int) -> list[T | PointbookError]:
        """Do steps of one merchant in one transaction; one that is refused changes nothing and spoils no other."""

        async def work(connection: Connection) -> list[T | PointbookError]:
            board = await _lock(connection, merchant_id, steps, now_ms)
            answers = [_answer(step, board) for step in steps]
            await _write(connection, merchant_id, board)
            return answers

        return await self._database.transaction(work, planned_once=True)

    async def live(self, merchant_id: str, customer: str, family: Family) -> Challenge | None:
        """Read a customer's live challenge of a family."""
        is_call = family is Family.MISSED_CALL
        named = {"merchant_id": merchant_id, "customer": customer, "is_call": is_call}
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_LIVE, named)
        return None if row is None else queries.read_challenge(row)

    async def lock(self, connection: Connection, merchant_id: str, customers: Iterable[str]) -> None:
        """Lock customers' live challenges in somebody's transaction, in the order that everybody keeps to."""
        await connection.fetch(queries.LOCK_LIVE, {"merchant_id": merchant_id, "customers": sorted(customers)})

    async def consume(self, connection: Connection, challenge: Challenge, actor: str, now_ms: int) -> bool:
        """Use a live challenge up in somebody's transaction; False where it is not live any more, or was renewed."""
        merchant_id = challenge.purpose.merchant_id
        named = {
            "merchant_id": merchant_id,
            "customer": challenge.purpose.customer,
            "challenge_id": challenge.challenge_id,
            "code_digest": challenge.code_digest,
            "now_ms": now_ms,
        }
        if not await connection.execute(queries.CONSUME, named):
            return False
        await _audit(connection, merchant_id, [told_of(Action.USE, "USED", challenge, actor)], now_ms)
        return True

    async def end(self, connection: Connection, merchant_id: str, customer: str, reason: str, now_ms: int) -> None:
        """End a customer's live challenges in the caller's transaction, which holds the customer's lock."""
        rows = await connection.fetch(queries.END_LIVE, {"merchant_id": merchant_id, "customer": customer})
        told = [
            AuditRecord(
                Action.END, "ENDED", customer, row.challenge_id, row.program_id, row.points, row.channel, "", reason
            )
            for row in rows
        ]
        await _audit(connection, merchant_id, told, now_ms)

    async def confirm(self, call: MissedCall, caller_digests: list[bytes], actor: str, now_ms: int) -> str:
        """Let a missed call meet the caller's newest live challenge, once per call; answers its id, or nothing."""
        # Some providers make their ids of the numbers, which are kept nowhere in clear.
        call_digest = sha256(call.provider_call_id.encode()).hexdigest()
        named = {"merchant_id": call.merchant_id, "call_digest": call_digest, "now_ms": now_ms}

        async def work(connection: Connection) -> str:
            if not await connection.execute(queries.CLAIM_CALL, named):
                row = await connection.fetch_one(queries.READ_CALL, named)
                return "" if row is None else str(row.challenge_id)
            values = {
                "destination_digests": caller_digests,
                "called_numbers": phones.forms(call.called_number),
                "call_ms": call.call_ms,
            }
            row = await connection.fetch_one(queries.LOCK_CALLED, named | values)
            if row is None:
                return ""
            challenge = queries.read_challenge(row)
            met = named | {"challenge_id": challenge.challenge_id}
            await connection.execute(queries.CONFIRM, met)
            await connection.execute(queries.NAME_CALL, met)
            # A customer may call as often as they like.
            told = told_of(Action.CONFIRM, "SEEN", challenge, actor)._replace(period=day_of(now_ms))
            await _audit(connection, call.merchant_id, [told], now_ms)
            return challenge.challenge_id

        return await self._database.transaction(work, planned_once=True)

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of events under some names, the newest first; an empty challenge_id means all challenges."""
        values = {"merchant_id": merchant_id, "customers": sorted(customers), "challenge_id": challenge_id}
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_EVENTS, values | asdict(query))
        return [ValidationEvent(*row) for row in rows]

    async def old_merchants(self, now_ms: int) -> list[str]:
        """Tell merchants with something to clean up, without locking anything."""
        values = {"before_ms": now_ms - KEPT_MS, "limit": CLEAN_UP_COUNT}
        async with self._database.autocommit() as connection:
            return [row.merchant_id for row in await connection.fetch(queries.LIST_OLD_MERCHANTS, values)]

    async def clean_up(self, merchant_id: str, now_ms: int) -> int:
        """Delete some of what a merchant needs no more, and tell how much.

        What somebody works on is left for the next time, so that several servers do not wait for each other.
        """
        values = {"merchant_id": merchant_id, "before_ms": now_ms - KEPT_MS, "limit": CLEAN_UP_COUNT}

        async def work(connection: Connection) -> int:
            return sum([await connection.execute(statement, values) for statement in queries.DELETE_OLD.values()])

        return await self._database.transaction(work)


async def _lock(connection: Connection, merchant_id: str, steps: Sequence[Command[T]], now_ms: int) -> LockedState:
    """Lock all that some steps work on; a count that nobody has begun is empty."""
    customers = {"merchant_id": merchant_id, "customers": sorted({step.customer for step in steps})}
    live = map(queries.read_challenge, await connection.fetch(queries.LOCK_LIVE, customers))
    subjects = subjects_of(steps)
    tallies = dict.fromkeys(subjects, SlidingWindowCounter())
    if subjects:
        named = {"merchant_id": merchant_id, "subjects": subjects}
        rows = await connection.fetch(queries.LOCK_TALLIES, named)
        tallies |= {row.subject: queries.read_tally(row) for row in rows}
    by_family = {(challenge.purpose.customer, challenge.family): challenge for challenge in live}
    return LockedState(now_ms, by_family, tallies)


def _answer(step: Command[T], board: LockedState) -> T | PointbookError:
    try:
        return step.run(board)
    except PointbookError as error:
        return error


async def _write(connection: Connection, merchant_id: str, board: LockedState) -> None:
    """Write what steps have changed. Where another call came between, the transaction runs again."""
    changed = [challenge for name, challenge in board.challenges.items() if name not in board.opened]
    opened = [challenge for name, challenge in board.challenges.items() if name in board.opened]
    # One that was live gives its place free before another one takes it.
    if changed:
        values = {"merchant_id": merchant_id, **queries.to_columns(changed)}
        await connection.execute(queries.UPDATE_CHALLENGES, values)
    if opened:
        values = {"merchant_id": merchant_id, **queries.to_columns(opened)}
        if await connection.execute(queries.INSERT_CHALLENGES, values) < len(opened):
            raise RetryTransactionError
    await _put_tallies(connection, merchant_id, board)
    await _audit(connection, merchant_id, board.audit, board.now_ms)


async def _put_tallies(connection: Connection, merchant_id: str, board: LockedState) -> None:
    subjects = sorted(board.counted)
    if not subjects:
        return
    tallies = [board.tallies[subject] for subject in subjects]
    values = {
        "merchant_id": merchant_id,
        "subjects": subjects,
        "counts": [queries.write_tally(tally) for tally in tallies],
        "revisions": [tally.revision + 1 for tally in tallies],
        "now_ms": board.now_ms,
    }
    if await connection.execute(queries.PUT_TALLIES, values) < len(subjects):
        raise RetryTransactionError


async def _audit(connection: Connection, merchant_id: str, told: Iterable[AuditRecord], now_ms: int) -> None:
    """Write lines of the audit; those that repeat one of their period are added to its count."""
    rows: dict[str, dict[str, Any]] = {}
    for line in told:
        audit_id, repeat_key = time_ordered_id(), _repeat_key(line)
        row = {"audit_id": audit_id, "repeat_key": repeat_key, "event_count": 0, **line._asdict()}
        rows.setdefault(f"{line.customer} {repeat_key}" if repeat_key else audit_id, row)["event_count"] += 1
    if rows:
        columns = {name: [row[name] for row in rows.values()] for name in queries.AUDIT_COLUMNS}
        await connection.execute(queries.INSERT_AUDIT, {"merchant_id": merchant_id, "now_ms": now_ms, **columns})


def _repeat_key(line: AuditRecord) -> str:
    """Return what the repetitions of a line have in common; empty where each is a row of its own."""
    if not line.period:
        return ""
    parts = (line.action, line.outcome, line.challenge_id, line.actor, line.period)
    return sha256("\n".join(parts).encode()).hexdigest()
