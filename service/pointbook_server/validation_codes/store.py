"""The SQL of one-time codes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Text, all_, and_, any_, bindparam, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.database import Connection, Database, RetryTransactionError, Row, Statement
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
IS_CHALLENGE = and_(COLUMNS.challenge_id == bindparam("challenge"), COLUMNS.merchant_id == bindparam("merchant"))
# The state is part of the text, or a plan for any state could not use the index of the live ones.
IS_LIVE = and_(
    COLUMNS.customer == bindparam("customer"),
    COLUMNS.merchant_id == bindparam("merchant"),
    COLUMNS.state == literal_column("'LIVE'"),
)
KEYS = bindparam("keys", type_=ARRAY(Text))
LOCK_LIVE = Statement(select(validation_challenges).where(IS_LIVE).with_for_update())
INSERT_CHALLENGE = Statement(
    insert(validation_challenges)
    .values({column.name: bindparam(column.name) for column in COLUMNS if column.server_default is None})
    .on_conflict_do_nothing()
)
RENEW_CHALLENGE = Statement(
    update(validation_challenges)
    .where(IS_CHALLENGE)
    .values(
        key_id=bindparam("new_key_id"),
        code_digest=bindparam("new_code_digest"),
        delivery=bindparam("new_delivery"),
        sent_at_ms=bindparam("now"),
        resend_at_ms=bindparam("new_resend_at_ms"),
        expires_at_ms=bindparam("new_expires_at_ms"),
    )
)
REPLACE_CHALLENGE = Statement(update(validation_challenges).where(IS_CHALLENGE).values(state="REPLACED"))
# A newer code may have been sent meanwhile.
RECORD_DELIVERY = Statement(
    update(validation_challenges)
    .where(IS_CHALLENGE, COLUMNS.code_digest == bindparam("digest"))
    .values(delivery=bindparam("new_delivery"), resend_at_ms=bindparam("new_resend_at_ms"))
)


@dataclass(frozen=True, slots=True)
class Guesses:
    """The statements for guesses that name a challenge_id, or for those that name none: each has its own counter."""

    count: Statement
    give_back: Statement
    consume: Statement
    find_unknown_key: Statement


def _guesses(counter: Any, *named: Any) -> Guesses:
    may_be_guessed = and_(
        IS_LIVE,
        COLUMNS.expires_at_ms > bindparam("now"),
        COLUMNS.attempts < ATTEMPTS_MAX,
        counter < ATTEMPTS_MAX,
        *named,
    )
    return Guesses(
        count=Statement(
            update(validation_challenges)
            .where(may_be_guessed, COLUMNS.key_id == any_(KEYS))
            .values({counter: counter + 1})
            .returning(validation_challenges)
        ),
        give_back=Statement(
            update(validation_challenges).where(IS_CHALLENGE, counter > 0).values({counter: counter - 1})
        ),
        consume=Statement(
            update(validation_challenges)
            .where(
                IS_CHALLENGE,
                COLUMNS.state == literal_column("'LIVE'"),
                COLUMNS.code_digest == bindparam("digest"),
                COLUMNS.expires_at_ms > bindparam("now"),
            )
            .values({COLUMNS.state: "USED", counter: func.greatest(counter - 1, 0)})
        ),
        find_unknown_key=Statement(select(COLUMNS.challenge_id).where(may_be_guessed, COLUMNS.key_id != all_(KEYS))),
    )


NAMED_GUESSES = _guesses(COLUMNS.attempts, COLUMNS.challenge_id == bindparam("challenge"))
UNNAMED_GUESSES = _guesses(COLUMNS.unnamed_attempts)


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

        async def work(connection: Connection) -> tuple[Challenge, bool]:
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

        return await self._database.transaction(work, planned_once=True)

    async def record_delivery(self, challenge: Challenge, delivery: Delivery, resend_at_ms: int) -> None:
        """Write what became of a code's message, unless a newer code was sent meanwhile."""
        values = _named(challenge) | {
            "digest": challenge.code_digest,
            "new_delivery": delivery.value,
            "new_resend_at_ms": resend_at_ms,
        }
        async with self._database.autocommit() as connection:
            await connection.execute(RECORD_DELIVERY, values)

    async def count_attempt(
        self, purpose: Purpose, challenge_id: str, key_ids: Collection[str], now_ms: int
    ) -> Challenge | None:
        """Count an attempt against a live challenge and commit; None where there is none that may be guessed.

        Without a challenge_id the customer's live challenge is meant. Such guesses are counted by themselves, so that
        whoever does not know the id cannot lock out whoever does.
        """
        values = _guess(purpose, challenge_id, key_ids, now_ms)
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(_guesses_of(challenge_id).count, values)
        return None if row is None else _to_challenge(row)

    async def return_attempt(self, challenge: Challenge, challenge_id: str) -> None:
        """Give the attempt of a right guess back to the counter that it was taken from."""
        async with self._database.autocommit() as connection:
            await connection.execute(_guesses_of(challenge_id).give_back, _named(challenge))

    async def consume(self, connection: Connection, challenge: Challenge, challenge_id: str, now_ms: int) -> bool:
        """Use a live challenge up, and give the attempt back, in somebody's transaction; False where it is not live."""
        values = _named(challenge) | {"digest": challenge.code_digest, "now": now_ms}
        return await connection.execute(_guesses_of(challenge_id).consume, values) > 0

    async def has_unknown_key(self, purpose: Purpose, challenge_id: str, key_ids: Collection[str], now_ms: int) -> bool:
        """Tell whether there is a live challenge to guess whose code was signed with another key."""
        values = _guess(purpose, challenge_id, key_ids, now_ms)
        async with self._database.autocommit() as connection:
            return await connection.fetch_one(_guesses_of(challenge_id).find_unknown_key, values) is not None

    async def _lock_live(self, connection: Connection, purpose: Purpose) -> Challenge | None:
        """Lock and read a customer's live challenge."""
        row = await connection.fetch_one(LOCK_LIVE, {"merchant": purpose.merchant_id, "customer": purpose.customer})
        return None if row is None else _to_challenge(row)

    async def _insert(self, connection: Connection, challenge: Challenge, now_ms: int) -> None:
        """Insert a live challenge; where another call has just done so, run the transaction again."""
        purpose = challenge.purpose
        values = {
            "challenge_id": challenge.challenge_id,
            "merchant_id": purpose.merchant_id,
            "customer": purpose.customer,
            "program_id": purpose.program_id,
            "points": purpose.points,
            "group_redemption": purpose.group_redemption,
            "group_id": purpose.group_id,
            "channel": challenge.route.channel.value,
            "destination": challenge.route.destination,
            "key_id": challenge.key_id,
            "code_digest": challenge.code_digest,
            "state": "LIVE",
            "delivery": challenge.delivery.value,
            "sent_at_ms": now_ms,
            "resend_at_ms": challenge.resend_at_ms,
            "expires_at_ms": challenge.expires_at_ms,
        }
        if not await connection.execute(INSERT_CHALLENGE, values):
            raise RetryTransactionError

    async def _renew(self, connection: Connection, fresh: Challenge, now_ms: int) -> None:
        """Put a fresh code under a locked challenge. Its attempts stay as they are."""
        values = _named(fresh) | {
            "now": now_ms,
            "new_key_id": fresh.key_id,
            "new_code_digest": fresh.code_digest,
            "new_delivery": fresh.delivery.value,
            "new_resend_at_ms": fresh.resend_at_ms,
            "new_expires_at_ms": fresh.expires_at_ms,
        }
        await connection.execute(RENEW_CHALLENGE, values)

    async def _replace(self, connection: Connection, challenge: Challenge) -> None:
        """End a live challenge for another one."""
        await connection.execute(REPLACE_CHALLENGE, _named(challenge))


def _named(challenge: Challenge) -> dict[str, object]:
    return {"challenge": challenge.challenge_id, "merchant": challenge.purpose.merchant_id}


def _guess(purpose: Purpose, challenge_id: str, key_ids: Collection[str], now_ms: int) -> dict[str, object]:
    return {
        "challenge": challenge_id,
        "merchant": purpose.merchant_id,
        "customer": purpose.customer,
        "keys": list(key_ids),
        "now": now_ms,
    }


def _guesses_of(challenge_id: str) -> Guesses:
    return NAMED_GUESSES if challenge_id else UNNAMED_GUESSES


def _to_challenge(row: Row) -> Challenge:
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
