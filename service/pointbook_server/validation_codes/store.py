"""The SQL of one-time codes."""

from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from pointbook_server.database import Database, RetryTransactionError
from pointbook_server.programs.model import Channel
from pointbook_server.tables import validation_challenges
from pointbook_server.validation_codes.model import (
    ATTEMPTS_MAX,
    Challenge,
    Delivery,
    Purpose,
    Route,
    new_challenge_id,
)

COLUMNS = validation_challenges.c


class ValidationCodesStore:
    """Reads and writes challenges. A customer has at most one live challenge."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(
        self, purpose: Purpose, route: Route, make: Callable[[str], Challenge], now_ms: int
    ) -> tuple[Challenge, bool]:
        """Find or make the customer's live challenge for a purpose and route, in one transaction.

        `make` makes a challenge with a fresh code under a challenge_id. Answers the live challenge, and whether its
        code is fresh and wants to be sent: of many parallel calls only one is told so. The same purpose and route
        keeps its challenge through its life, the attempts included, and gets a fresh code after the cooldown;
        anything else replaces the live challenge.
        """

        async def work(connection: AsyncConnection) -> tuple[Challenge, bool]:
            live = await self._lock_live(connection, purpose)
            if live is not None and live.holds(purpose, route, now_ms):
                if now_ms < live.may_resend_at_ms:
                    return live, False
                fresh = make(live.challenge_id)
                await self._renew(connection, fresh, now_ms)
                return fresh, True
            if live is not None:
                await self._replace(connection, live)
            fresh = make(new_challenge_id())
            await self._insert(connection, fresh, now_ms)
            return fresh, True

        return await self._database.transaction(work)

    async def record_delivery(self, challenge: Challenge, delivery: Delivery, resend_at_ms: int) -> None:
        """Write what became of a code's message, unless a newer code was sent meanwhile."""
        statement = (
            update(validation_challenges)
            .where(_is_challenge(challenge), COLUMNS.code_digest == challenge.code_digest)
            .values(delivery=delivery.value, resend_at_ms=resend_at_ms)
        )
        async with self._database.autocommit() as connection:
            await connection.execute(statement)

    async def count_attempt(
        self, purpose: Purpose, challenge_id: str, key_ids: Collection[str], now_ms: int
    ) -> Challenge | None:
        """Count an attempt against a live challenge and commit; None where there is none that may be guessed.

        Without a challenge_id the customer's live challenge is meant. Such guesses are counted by themselves, so that
        whoever does not know the id cannot lock out whoever does.
        """
        counter = _counter(challenge_id)
        statement = (
            update(validation_challenges)
            .where(*_may_be_guessed(purpose, challenge_id, now_ms), COLUMNS.key_id.in_(key_ids))
            .values({counter: counter + 1})
            .returning(validation_challenges)
        )
        async with self._database.autocommit() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _to_challenge(row)

    async def return_attempt(self, challenge: Challenge, challenge_id: str) -> None:
        """Give the attempt of a right guess back to the counter that it was taken from."""
        counter = _counter(challenge_id)
        statement = (
            update(validation_challenges).where(_is_challenge(challenge), counter > 0).values({counter: counter - 1})
        )
        async with self._database.autocommit() as connection:
            await connection.execute(statement)

    async def has_unknown_key(self, purpose: Purpose, challenge_id: str, key_ids: Collection[str], now_ms: int) -> bool:
        """Tell whether there is a live challenge to guess whose code was signed with another key."""
        query = select(COLUMNS.challenge_id).where(
            *_may_be_guessed(purpose, challenge_id, now_ms), COLUMNS.key_id.not_in(key_ids)
        )
        async with self._database.autocommit() as connection:
            return (await connection.execute(query)).one_or_none() is not None

    async def _lock_live(self, connection: AsyncConnection, purpose: Purpose) -> Challenge | None:
        """Lock and read a customer's live challenge."""
        query = (
            select(validation_challenges)
            .where(
                COLUMNS.customer == purpose.customer,
                COLUMNS.merchant_id == purpose.merchant_id,
                COLUMNS.state == "LIVE",
            )
            .with_for_update()
        )
        row = (await connection.execute(query)).one_or_none()
        return None if row is None else _to_challenge(row)

    async def _insert(self, connection: AsyncConnection, challenge: Challenge, now_ms: int) -> None:
        """Insert a live challenge; where another call has just done so, run the transaction again."""
        purpose = challenge.purpose
        statement = (
            insert(validation_challenges)
            .values(
                challenge_id=challenge.challenge_id,
                merchant_id=purpose.merchant_id,
                customer=purpose.customer,
                program_id=purpose.program_id,
                points=purpose.points,
                group_redemption=purpose.group_redemption,
                group_id=purpose.group_id,
                channel=challenge.route.channel.value,
                destination=challenge.route.destination,
                key_id=challenge.key_id,
                code_digest=challenge.code_digest,
                state="LIVE",
                delivery=challenge.delivery.value,
                sent_at_ms=now_ms,
                resend_at_ms=challenge.resend_at_ms,
                expires_at_ms=challenge.expires_at_ms,
            )
            .on_conflict_do_nothing()
            .returning(COLUMNS.challenge_id)
        )
        if (await connection.execute(statement)).one_or_none() is None:
            raise RetryTransactionError

    async def _renew(self, connection: AsyncConnection, fresh: Challenge, now_ms: int) -> None:
        """Put a fresh code under a locked challenge. Its attempts stay as they are."""
        await connection.execute(
            update(validation_challenges)
            .where(_is_challenge(fresh))
            .values(
                key_id=fresh.key_id,
                code_digest=fresh.code_digest,
                delivery=fresh.delivery.value,
                sent_at_ms=now_ms,
                resend_at_ms=fresh.resend_at_ms,
                expires_at_ms=fresh.expires_at_ms,
            )
        )

    async def _replace(self, connection: AsyncConnection, challenge: Challenge) -> None:
        """End a live challenge for another one."""
        await connection.execute(update(validation_challenges).where(_is_challenge(challenge)).values(state="REPLACED"))


def _is_challenge(challenge: Challenge) -> Any:
    return (COLUMNS.challenge_id == challenge.challenge_id) & (COLUMNS.merchant_id == challenge.purpose.merchant_id)


def _counter(challenge_id: str) -> Any:
    """Choose the counter of guesses that name a challenge_id, or that name none."""
    return COLUMNS.attempts if challenge_id else COLUMNS.unnamed_attempts


def _may_be_guessed(purpose: Purpose, challenge_id: str, now_ms: int) -> list[Any]:
    """Match the customer's live challenge, named or not, that has attempts left."""
    conditions = [
        COLUMNS.customer == purpose.customer,
        COLUMNS.merchant_id == purpose.merchant_id,
        COLUMNS.state == "LIVE",
        COLUMNS.expires_at_ms > now_ms,
        COLUMNS.attempts < ATTEMPTS_MAX,
        _counter(challenge_id) < ATTEMPTS_MAX,
    ]
    if challenge_id:
        conditions.append(COLUMNS.challenge_id == challenge_id)
    return conditions


def _to_challenge(row: Row[Any]) -> Challenge:
    purpose = Purpose(
        merchant_id=row.merchant_id,
        customer=row.customer,
        program_id=row.program_id,
        points=row.points,
        group_redemption=row.group_redemption,
        group_id=row.group_id,
    )
    return Challenge(
        challenge_id=row.challenge_id,
        purpose=purpose,
        route=Route(Channel(row.channel), row.destination),
        key_id=row.key_id,
        code_digest=row.code_digest,
        attempts=row.attempts,
        delivery=Delivery(row.delivery),
        resend_at_ms=row.resend_at_ms,
        expires_at_ms=row.expires_at_ms,
    )
