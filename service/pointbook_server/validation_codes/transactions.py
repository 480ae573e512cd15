"""Transactions of one-time codes.

Each locks live challenges by customer first, then counters by name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from itertools import starmap
from types import MappingProxyType
from typing import TypeVar

from pointbook_server.clock import time_ordered_id
from pointbook_server.customers import phones
from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.validation_codes import queries
from pointbook_server.validation_codes.audit import (
    ENDED,
    SEEN,
    USED,
    AuditAction,
    AuditRecord,
    challenge_record,
    day_period,
)
from pointbook_server.validation_codes.commands import Command, counter_names_of
from pointbook_server.validation_codes.locked_state import LockedState
from pointbook_server.validation_codes.model import (
    Challenge,
    ChallengeKind,
    ChallengeState,
    MissedCall,
    ValidationEvent,
)
from pointbook_server.validation_codes.rate_limits import SlidingWindowCounter

T = TypeVar("T")


class ValidationCodeTransactions:
    """Reads and writes challenges, counters and the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, merchant_id: str, commands: Sequence[Command[T]], now_ms: int) -> list[T | PointbookError]:
        """Run a merchant's commands in one transaction, and return their results.

        A refused command changes nothing but the audit, and does not affect the others.
        """

        async def run_locked(connection: Connection) -> list[T | PointbookError]:
            state = await _lock(connection, merchant_id, commands, now_ms)
            results = [_run_command(command, state) for command in commands]
            await _write(connection, merchant_id, state)
            return results

        return await self._database.transaction(run_locked, planned_once=True)

    async def read_live(self, merchant_id: str, customer: str, kind: ChallengeKind) -> Challenge | None:
        """Return a customer's live challenge of a kind."""
        params = {"merchant_id": merchant_id, "customer": customer, "is_call": kind is ChallengeKind.MISSED_CALL}
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_LIVE, params)
        return None if row is None else queries.challenge_from_row(row)

    async def lock(self, connection: Connection, merchant_id: str, customers: Iterable[str]) -> list[Challenge]:
        """Lock customers' live challenges in the caller's transaction, and return them."""
        return await _lock_live(connection, merchant_id, customers)

    async def use(
        self, connection: Connection, merchant_id: str, used: Sequence[tuple[Challenge, str]], now_ms: int
    ) -> None:
        """Use locked challenges in the caller's transaction, each with the actor.

        Source: docs/reference/validation-codes.md#single-use
        """
        challenges = [challenge._replace(state=ChallengeState.USED) for challenge, _ in used]
        records = [challenge_record(AuditAction.USE, USED, challenge, actor) for challenge, actor in used]
        await _write_rows(connection, queries.UPDATE, merchant_id, now_ms, challenges=challenges, records=records)

    async def end(self, connection: Connection, merchant_id: str, customer: str, reason: str, now_ms: int) -> None:
        """End a customer's live challenges in the caller's transaction.

        That transaction holds the customer's lock.
        """
        rows = await connection.fetch(queries.END_LIVE, {"merchant_id": merchant_id, "customer": customer})
        records = [
            AuditRecord(
                AuditAction.END, ENDED, customer, row.challenge_id, row.program_id, row.points, row.channel, "", reason
            )
            for row in rows
        ]
        await _insert_audit(connection, merchant_id, records, now_ms)

    async def confirm(self, call: MissedCall, caller_digests: list[bytes], actor: str, now_ms: int) -> str:
        """Confirm the caller's newest live challenge, and return its id or "".

        A call confirms one challenge: a repeated report returns the same id.
        """
        # Some providers derive call ids from the numbers, which are stored nowhere in clear.
        call_digest = sha256(call.provider_call_id.encode()).hexdigest()
        params = {"merchant_id": call.merchant_id, "call_digest": call_digest, "now_ms": now_ms}

        async def confirm_once(connection: Connection) -> str:
            if not await connection.count_written(queries.CLAIM_CALL, params):
                row = await connection.fetch_one(queries.READ_CALL, params)
                return "" if row is None else str(row.challenge_id)
            call_params = {
                "destination_digests": caller_digests,
                "called_numbers": phones.forms(call.called_number),
                "call_ms": call.call_ms,
            }
            row = await connection.fetch_one(queries.LOCK_CALLED, params | call_params)
            if row is None:
                return ""
            challenge = queries.challenge_from_row(row)
            confirmed = params | {"challenge_id": challenge.challenge_id}
            await connection.execute(queries.CONFIRM, confirmed)
            await connection.execute(queries.SET_CALL_CHALLENGE, confirmed)
            # Customers may call without limit, so their records are counted by the day.
            record = challenge_record(AuditAction.CONFIRM, SEEN, challenge, actor)._replace(period=day_period(now_ms))
            await _insert_audit(connection, call.merchant_id, [record], now_ms)
            return challenge.challenge_id

        return await self._database.transaction(confirm_once, planned_once=True)

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of some customers' events, the newest first.

        An empty challenge_id matches every challenge.
        """
        params = {"merchant_id": merchant_id, "customers": sorted(customers), "challenge_id": challenge_id}
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_EVENTS, params | asdict(query))
        return [ValidationEvent(*row) for row in rows]


async def _lock(connection: Connection, merchant_id: str, commands: Sequence[Command[T]], now_ms: int) -> LockedState:
    """Lock all rows that some commands need; a counter without a row is empty."""
    live = await _lock_live(connection, merchant_id, {command.customer for command in commands})
    names = counter_names_of(commands)
    counters = dict.fromkeys(names, SlidingWindowCounter())
    if names:
        rows = await connection.fetch(queries.LOCK_COUNTERS, {"merchant_id": merchant_id, "names": names})
        counters |= {row.subject: queries.counter_from_row(row) for row in rows}
    live_by_kind = {(challenge.purpose.customer, challenge.kind): challenge for challenge in live}
    return LockedState(now_ms, live_by_kind, counters)


async def _lock_live(connection: Connection, merchant_id: str, customers: Iterable[str]) -> list[Challenge]:
    params = {"merchant_id": merchant_id, "customers": sorted(customers)}
    return [queries.challenge_from_row(row) for row in await connection.fetch(queries.LOCK_LIVE, params)]


def _run_command(command: Command[T], state: LockedState) -> T | PointbookError:
    try:
        return command.run(state)
    except PointbookError as error:
        return error


async def _write(connection: Connection, merchant_id: str, state: LockedState) -> None:
    """Write the changes of some commands.

    Raises RetryTransactionError if another transaction inserted a row first.
    """
    changes = state.changed_challenges.items()
    updated = [challenge for challenge_id, challenge in changes if challenge_id not in state.opened_ids]
    opened = [challenge for challenge_id, challenge in changes if challenge_id in state.opened_ids]
    counters = {name: state.counters[name] for name in sorted(state.changed_counters)}
    if opened and updated:
        await _write_rows(connection, queries.UPDATE, merchant_id, state.now_ms, challenges=updated)
    statement, challenges = (queries.INSERT, opened) if opened else (queries.UPDATE, updated)
    await _write_rows(
        connection,
        statement,
        merchant_id,
        state.now_ms,
        challenges=challenges,
        records=state.audit,
        counters=counters,
    )


async def _write_rows(
    connection: Connection,
    statement: Statement,
    merchant_id: str,
    now_ms: int,
    *,
    challenges: Sequence[Challenge],
    records: Iterable[AuditRecord] = (),
    counters: Mapping[str, SlidingWindowCounter] = MappingProxyType({}),
) -> None:
    """Write challenges, counters and audit by queries.UPDATE or queries.INSERT.

    Raises RetryTransactionError if another transaction inserted a row first.
    """
    params = {
        "merchant_id": merchant_id,
        "now_ms": now_ms,
        "validation_challenge_row": list(map(queries.challenge_to_row, challenges)),
        "validation_counter_row": list(starmap(queries.counter_to_row, counters.items())),
        "validation_audit_row": _audit_rows(records),
    }
    (counts,) = await connection.fetch(statement, params)
    if tuple(counts) != (len(challenges), len(counters)):
        raise RetryTransactionError


async def _insert_audit(connection: Connection, merchant_id: str, records: Sequence[AuditRecord], now_ms: int) -> None:
    if records:
        params = {"merchant_id": merchant_id, "now_ms": now_ms, "validation_audit_row": _audit_rows(records)}
        await connection.execute(queries.INSERT_AUDIT, params)


def _audit_rows(records: Iterable[AuditRecord]) -> list[tuple[str | int, ...]]:
    """Convert records to validation_audit_rows.

    A repetition in a period only adds to a count.
    """
    rows: dict[str, tuple[str | int, ...]] = {}
    counts: Counter[str] = Counter()
    for record in records:
        audit_id, repeat_key = time_ordered_id(), _repeat_key(record)
        key = f"{record.customer} {repeat_key}" if repeat_key else audit_id
        rows.setdefault(key, (audit_id, *record.columns, repeat_key))
        counts[key] += 1
    return [(*row, counts[key]) for key, row in rows.items()]


def _repeat_key(record: AuditRecord) -> str:
    """Return the key that repetitions of a record share, or "" for a row of its own."""
    if not record.period:
        return ""
    parts = (record.action, record.outcome, record.challenge_id, record.actor, record.period)
    return sha256("\n".join(parts).encode()).hexdigest()
