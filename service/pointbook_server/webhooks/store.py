"""The SQL of the quarantine.

Whoever changes a merchant's usage locks its row before any webhook's, so that no two transactions wait for each other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import (
    BigInteger,
    LargeBinary,
    Text,
    and_,
    any_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.tables import quarantine_usage, quarantined_webhooks
from pointbook_server.webhooks.model import (
    Bounds,
    Claim,
    Content,
    Quarantined,
    QuarantineReason,
    State,
    Webhook,
    new_quarantine_id,
    store_of,
    subject_of,
)
from pointbook_server.webhooks.sealing import Sealed, Sealer

WEBHOOK = quarantined_webhooks.c
USAGE = quarantine_usage.c
IS_WEBHOOK = and_(WEBHOOK.quarantine_id == bindparam("id"), WEBHOOK.merchant_id == bindparam("merchant"))
IS_MERCHANT = USAGE.merchant_id == bindparam("merchant")
TELLS_OF = and_(
    WEBHOOK.subject_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))),
    WEBHOOK.merchant_id == bindparam("merchant"),
)
IS_OF_STORE = and_(
    WEBHOOK.store_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))),
    WEBHOOK.merchant_id == bindparam("merchant"),
    WEBHOOK.body.is_not(None),
)
ERASED = "erased"
"""What a webhook was replayed as, when its body was erased."""
NAMES = [field.name for field in fields(Quarantined)]
FACTS = [WEBHOOK.body.is_(None).label(name) if name == "body_erased" else WEBHOOK[name] for name in NAMES]

COUNT_REPETITION = Statement(
    update(quarantined_webhooks)
    .where(
        WEBHOOK.body_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))),
        WEBHOOK.reason == bindparam("why"),
        WEBHOOK.merchant_id == bindparam("merchant"),
    )
    .values(
        receive_count=WEBHOOK.receive_count + 1,
        last_received_at_ms=func.greatest(WEBHOOK.last_received_at_ms, bindparam("now", type_=BigInteger)),
    )
    .returning(WEBHOOK.quarantine_id)
)
OPEN_USAGE = Statement(
    insert(quarantine_usage)
    .values(merchant_id=bindparam("merchant_id"), webhooks=0, bytes=0)
    .on_conflict_do_nothing(constraint="pk_quarantine_usage")
)
LOCK_USAGE = Statement(select(USAGE.merchant_id).where(IS_MERCHANT).with_for_update())
# Who finds room has locked the row until the webhook is committed.
TAKE_ROOM = Statement(
    update(quarantine_usage)
    .where(
        IS_MERCHANT,
        USAGE.webhooks < bindparam("webhooks_max"),
        USAGE.bytes + bindparam("size", type_=BigInteger) <= bindparam("bytes_max"),
    )
    .values(webhooks=USAGE.webhooks + 1, bytes=USAGE.bytes + bindparam("size", type_=BigInteger))
)
FREE_ROOM = Statement(
    update(quarantine_usage)
    .where(IS_MERCHANT)
    .values(webhooks=USAGE.webhooks - 1, bytes=USAGE.bytes - bindparam("size", type_=BigInteger))
)
INSERT_WEBHOOK = Statement(
    insert(quarantined_webhooks)
    .values({column.name: bindparam(column.name) for column in WEBHOOK})
    .on_conflict_do_nothing(constraint="uq_quarantined_webhooks_body")
)
DELETE_WEBHOOK = Statement(delete(quarantined_webhooks).where(IS_WEBHOOK).returning(WEBHOOK.reason, WEBHOOK.kept_bytes))
READ_WEBHOOK = Statement(select(*FACTS, WEBHOOK.key_id, WEBHOOK.headers, WEBHOOK.body).where(IS_WEBHOOK))
LOCK_WEBHOOK = Statement(
    select(WEBHOOK.topic, WEBHOOK.replay_event_id, WEBHOOK.replays_running, WEBHOOK.replay_until_ms)
    .where(IS_WEBHOOK)
    .with_for_update()
)
CLAIM_WEBHOOK = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK)
    .values(
        replay_event_id=bindparam("event"),
        replays_running=bindparam("running"),
        replay_until_ms=func.greatest(WEBHOOK.replay_until_ms, bindparam("until", type_=BigInteger)),
    )
)
# The last replay that ends frees the webhook, since the others may apply the event yet.
RELEASE_WEBHOOK = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK, WEBHOOK.replay_event_id == bindparam("event"), WEBHOOK.state == State.QUARANTINED.value)
    .values(
        replays_running=WEBHOOK.replays_running - 1,
        replay_event_id=case((WEBHOOK.replays_running > 1, WEBHOOK.replay_event_id)),
        replay_until_ms=case((WEBHOOK.replays_running > 1, WEBHOOK.replay_until_ms), else_=0),
    )
)
HAS_BODY = select(WEBHOOK.quarantine_id, func.octet_length(WEBHOOK.body).label("size")).order_by(WEBHOOK.quarantine_id)
LOCK_ABOUT = Statement(HAS_BODY.where(TELLS_OF, WEBHOOK.body.is_not(None)).with_for_update())
LOCK_OF_STORE = Statement(HAS_BODY.where(IS_OF_STORE).limit(bindparam("limit")).with_for_update())
COUNT_OF_STORE = Statement(select(func.count().label("webhooks")).select_from(quarantined_webhooks).where(IS_OF_STORE))
# What a webhook was replayed as is a digest of its content, so that it goes with the body.
ERASE_BODIES = Statement(
    update(quarantined_webhooks)
    .where(
        WEBHOOK.quarantine_id == any_(bindparam("ids", type_=ARRAY(Text))), WEBHOOK.merchant_id == bindparam("merchant")
    )
    .values(
        body=None,
        kept_bytes=func.octet_length(WEBHOOK.headers),
        replay_event_id=case((WEBHOOK.state == State.REPLAYED.value, ERASED), else_=WEBHOOK.replay_event_id),
    )
)
FREE_BYTES = Statement(
    update(quarantine_usage).where(IS_MERCHANT).values(bytes=USAGE.bytes - bindparam("size", type_=BigInteger))
)
MARK_REPLAYED = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK, WEBHOOK.replay_event_id == bindparam("event"))
    .values(
        state=State.REPLAYED.value,
        replayed_at_ms=func.coalesce(WEBHOOK.replayed_at_ms, bindparam("now", type_=BigInteger)),
    )
    .returning(WEBHOOK.replayed_at_ms)
)


def _is_or_null(column: Any, name: str) -> Any:
    """Compare a column with a parameter that keeps everything where it is NULL."""
    wanted = bindparam(name, type_=Text)
    return or_(wanted.is_(None), column == wanted)


LIST_WEBHOOKS = Statement(
    select(*FACTS)
    .where(
        WEBHOOK.merchant_id == bindparam("merchant"),
        WEBHOOK.state == bindparam("wanted_state"),
        tuple_(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
        > tuple_(bindparam("after_ms", type_=BigInteger), bindparam("after_id", type_=Text)),
        WEBHOOK.received_at_ms < bindparam("end_ms", type_=BigInteger),
        _is_or_null(WEBHOOK.reason, "why"),
        _is_or_null(WEBHOOK.topic, "about"),
    )
    .order_by(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
    .limit(bindparam("limit"))
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which webhooks of a merchant to list; None keeps all."""

    state: State
    reason: QuarantineReason | None
    topic: str | None
    start_ms: int
    end_ms: int


class WebhooksStore:
    """Reads and writes the quarantine."""

    def __init__(self, database: Database, sealer: Sealer, bounds: Bounds) -> None:
        self._database = database
        self._sealer = sealer
        self._bounds = bounds

    async def keep(self, webhook: Webhook) -> tuple[str, bool] | None:
        """Keep a webhook, or count its repetition; None where the quarantine is full.

        Answers its id and whether it was there, after it is committed. Raises KEY_NOT_CONFIGURED where there is no key
        for a customer webhook, or for one without a topic.
        """
        digests = self._sealer.digests(webhook)
        quarantine_id = new_quarantine_id()
        sealed = self._sealer.seal(webhook, quarantine_id)
        subject = subject_of(webhook.body)
        store_id = store_of(webhook)
        whose = {
            "subject_digest": self._sealer.subject_digests(subject)[0] if subject else None,
            "store_digest": self._sealer.subject_digests(store_id)[0] if store_id else None,
        }
        known = {
            "digests": digests,
            "why": webhook.reason.value,
            "merchant": webhook.merchant_id,
            "now": webhook.received_at_ms,
        }

        async def work(connection: Connection) -> tuple[str, bool] | None:
            if found := await connection.fetch_one(COUNT_REPETITION, known):
                return found.quarantine_id, True
            if await self._take_room(connection, webhook.merchant_id, sealed.size):
                row = _to_row(webhook, quarantine_id, digests[0], sealed)
                if not await connection.execute(INSERT_WEBHOOK, row | whose):
                    raise RetryTransactionError  # Another call has just kept it.
                return quarantine_id, False
            # The last room may just have been taken by the same webhook.
            found = await connection.fetch_one(COUNT_REPETITION, known)
            return None if found is None else (found.quarantine_id, True)

        return await self._database.transaction(work)

    async def webhooks(
        self, merchant_id: str, wanted: Filter, *, after: tuple[int, str] | None, limit: int
    ) -> list[Quarantined]:
        """Read a page of a merchant's webhooks, behind a place, the oldest first."""
        after_ms, after_id = after or (wanted.start_ms, "")
        values = {
            "merchant": merchant_id,
            "wanted_state": wanted.state.value,
            "why": wanted.reason and wanted.reason.value,
            "about": wanted.topic,
            "after_ms": after_ms,
            "after_id": after_id,
            "end_ms": wanted.end_ms,
            "limit": limit,
        }
        async with self._database.autocommit() as connection:
            return [_to_quarantined(row) for row in await connection.fetch(LIST_WEBHOOKS, values)]

    async def get(self, merchant_id: str, quarantine_id: str) -> tuple[Quarantined, Content]:
        """Read a webhook with its content. Raises WEBHOOK_NOT_FOUND and CODE_KEY_UNKNOWN."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_WEBHOOK, _named(merchant_id, quarantine_id))
        if row is None:
            raise webhook_not_found(quarantine_id)
        sealed = Sealed(row.key_id, row.headers, row.body)
        return _to_quarantined(row), self._sealer.open(sealed, merchant_id, quarantine_id)

    async def claim(self, merchant_id: str, quarantine_id: str, event_id: str, now_ms: int, until_ms: int) -> Claim:
        """Claim a webhook for its replay as one event, until a time by which that replay has ended.

        Any number of replays may claim the same event, since the book takes it once. They are counted, so that a
        refusal frees the webhook only when no other one may be running; those that never told their end count until
        their time is over.

        Raises WEBHOOK_NOT_FOUND, and EVENT_ID_REUSED where the webhook is claimed for another event.
        """
        named = _named(merchant_id, quarantine_id)

        async def work(connection: Connection) -> Claim:
            row = await connection.fetch_one(LOCK_WEBHOOK, named)
            if row is None:
                raise webhook_not_found(quarantine_id)
            if row.replay_event_id not in {None, event_id}:
                raise _replayed_otherwise(event_id)
            running = 1 if row.replay_until_ms <= now_ms else row.replays_running + 1
            await connection.execute(CLAIM_WEBHOOK, named | {"event": event_id, "running": running, "until": until_ms})
            return Claim(merchant_id, quarantine_id, event_id, row.topic)

        return await self._database.transaction(work)

    async def release(self, claim: Claim) -> None:
        """Give a claim back whose event was refused; the webhook is free unless another replay may apply it yet."""
        values = _named(claim.merchant_id, claim.quarantine_id) | {"event": claim.event_id}
        async with self._database.autocommit() as connection:
            await connection.execute(RELEASE_WEBHOOK, values)

    async def mark_replayed(self, claim: Claim, now_ms: int) -> int:
        """Mark a claimed webhook as replayed, and tell when it first was; one that is dropped by now is not missed."""
        values = _named(claim.merchant_id, claim.quarantine_id) | {"event": claim.event_id, "now": now_ms}
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(MARK_REPLAYED, values)
        return now_ms if row is None else int(row.replayed_at_ms)

    async def drop(self, merchant_id: str, quarantine_id: str) -> QuarantineReason:
        """Delete a webhook and free its room; tells why it was in quarantine. Raises WEBHOOK_NOT_FOUND."""

        async def work(connection: Connection) -> QuarantineReason:
            await connection.fetch_one(LOCK_USAGE, {"merchant": merchant_id})
            row = await connection.fetch_one(DELETE_WEBHOOK, _named(merchant_id, quarantine_id))
            if row is None:
                raise webhook_not_found(quarantine_id)
            await connection.execute(FREE_ROOM, {"merchant": merchant_id, "size": row.kept_bytes})
            return QuarantineReason(row.reason)

        return await self._database.transaction(work)

    async def erase(self, connection: Connection, merchant_id: str, buyer_ids: Iterable[str]) -> None:
        """Erase the bodies that tell of some buyers, inside the transaction that redacts them."""
        digests = [digest for buyer_id in buyer_ids for digest in self._sealer.subject_digests(buyer_id)]
        await self._erase(connection, merchant_id, LOCK_ABOUT, {"merchant": merchant_id, "digests": digests})

    async def erase_store(self, connection: Connection, merchant_id: str, store_id: str, limit: int) -> int:
        """Erase bodies of a store's customer webhooks, inside the transaction that erases it; returns how many."""
        of_store = {"merchant": merchant_id, "digests": self._sealer.subject_digests(store_id), "limit": limit}
        return await self._erase(connection, merchant_id, LOCK_OF_STORE, of_store)

    async def count_store(self, connection: Connection, merchant_id: str, store_id: str) -> int:
        """Count a store's customer webhooks that have a body."""
        of_store = {"merchant": merchant_id, "digests": self._sealer.subject_digests(store_id)}
        row = await connection.fetch_one(COUNT_OF_STORE, of_store)
        return 0 if row is None else int(row.webhooks)

    async def _erase(
        self, connection: Connection, merchant_id: str, lock: Statement, wanted: Mapping[str, object]
    ) -> int:
        """Erase the bodies that a statement locks, and return how many they were."""
        # Without a row to lock, the merchant's first webhook could come between the statements, or be missed.
        await connection.execute(OPEN_USAGE, {"merchant_id": merchant_id})
        await connection.fetch_one(LOCK_USAGE, {"merchant": merchant_id})
        found = await connection.fetch(lock, wanted)
        ids = [row.quarantine_id for row in found]
        await connection.execute(ERASE_BODIES, {"merchant": merchant_id, "ids": ids})
        await connection.execute(FREE_BYTES, {"merchant": merchant_id, "size": sum(row.size for row in found)})
        return len(ids)

    async def _take_room(self, connection: Connection, merchant_id: str, size: int) -> bool:
        """Count a new webhook in, if there is room; a merchant's first ones open its count, of which one does."""
        values = {
            "merchant": merchant_id,
            "size": size,
            "webhooks_max": self._bounds.webhooks_max,
            "bytes_max": self._bounds.bytes_max,
        }
        if await connection.execute(TAKE_ROOM, values):
            return True
        await connection.execute(OPEN_USAGE, {"merchant_id": merchant_id})
        return bool(await connection.execute(TAKE_ROOM, values))


def webhook_not_found(quarantine_id: str) -> PointbookError:
    """Tell that no such webhook is in a merchant's quarantine."""
    return PointbookError(
        Reason.WEBHOOK_NOT_FOUND,
        "No such webhook is in the merchant's quarantine.",
        metadata={"quarantine_id": quarantine_id},
    )


def _replayed_otherwise(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.EVENT_ID_REUSED,
        "The webhook was replayed, or is being replayed, as another update.",
        metadata={"event_id": event_id},
    )


def _named(merchant_id: str, quarantine_id: str) -> dict[str, object]:
    return {"merchant": merchant_id, "id": quarantine_id}


def _to_row(webhook: Webhook, quarantine_id: str, digest: bytes, sealed: Sealed) -> dict[str, object]:
    return {
        "quarantine_id": quarantine_id,
        "merchant_id": webhook.merchant_id,
        "reason": webhook.reason.value,
        "body_digest": digest,
        "detail": webhook.detail,
        "topic": webhook.topic,
        "key_id": sealed.key_id,
        "headers": sealed.headers,
        "body": sealed.body,
        "body_size": len(webhook.body),
        "kept_bytes": sealed.size,
        "received_at_ms": webhook.received_at_ms,
        "last_received_at_ms": webhook.received_at_ms,
        "receive_count": 1,
        "state": State.QUARANTINED.value,
        "replay_event_id": None,
        "replays_running": 0,
        "replay_until_ms": 0,
        "replayed_at_ms": None,
    }


def _to_quarantined(row: Row) -> Quarantined:
    read = Quarantined(**{name: row[name] for name in NAMES})
    return replace(read, reason=QuarantineReason(read.reason), state=State(read.state))
