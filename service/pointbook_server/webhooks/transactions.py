"""The SQL of the quarantine.

A webhook is in the quarantine of the merchant that its header names only where its body, which is signed, names a store
of that merchant, or where its token is for some merchants only. All others are in the shared quarantine, whose
merchant_id is empty. Either has a body once, whatever its headers are, so that one captured body takes two rows at
most, however often it is sent and under however many merchants. A merchant finds webhooks in both: in the shared one
those whose copies all name it.

Transactions lock the usage of the shared quarantine before a merchant's, and either before any webhook's, so that no
two wait for each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    LargeBinary,
    Text,
    and_,
    any_,
    bindparam,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.db.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.db.tables import quarantine_usage, quarantined_webhooks, stores
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.metrics import Metrics
from pointbook_server.webhooks.encryption import EncryptedPayload, PayloadCipher
from pointbook_server.webhooks.model import (
    NO_TOPIC,
    RECOUNT_MS,
    SHARED,
    Bounds,
    Claim,
    Limits,
    Quarantined,
    QuarantineReason,
    QuarantineState,
    View,
    Webhook,
    WebhookContent,
    new_quarantine_id,
    signed_store,
    store_of,
    subject_of,
)
from pointbook_server.webhooks.quota import Quota

WEBHOOK = quarantined_webhooks.c
USAGE = quarantine_usage.c
IS_WEBHOOK = and_(WEBHOOK.quarantine_id == bindparam("id"), WEBHOOK.merchant_id == bindparam("merchant"))
IS_MERCHANT = USAGE.merchant_id == bindparam("merchant")
CLAIMED = func.coalesce(WEBHOOK.claimed_merchant_id, WEBHOOK.merchant_id)
"""The merchant that a webhook's header named. Rows of earlier releases are in the quarantine of that merchant."""
CLAIMS = or_(
    WEBHOOK.merchant_id == bindparam("claimed"),
    and_(bindparam("claimed") == CLAIMED, or_(~WEBHOOK.is_contested, bindparam("sees_contested", type_=Boolean))),
)
"""Webhooks of any quarantine in which a merchant finds them: its own, and those in the shared one that name it."""
BOTH = WEBHOOK.merchant_id.in_([bindparam("claimed"), SHARED])
# A copy in the shared quarantine whose merchant is in doubt is erased for each that it may be of: one that names no
# merchant, or one without stores, may be a captured copy of anyone's.
MAY_BE_OF = and_(
    WEBHOOK.merchant_id == bindparam("merchant"),
    or_(
        bindparam("claimed") == CLAIMED,
        WEBHOOK.is_contested,
        ~exists().where(stores.c.merchant_id == CLAIMED),
    ),
    WEBHOOK.body.is_not(None),
)
TELLS_OF = and_(WEBHOOK.subject_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))), MAY_BE_OF)
IS_OF_STORE = and_(WEBHOOK.store_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))), MAY_BE_OF)
ERASED = "erased"
"""What a webhook was replayed as, when its body was erased."""
DERIVED = {"body_erased": WEBHOOK.body.is_(None), "merchant_id": CLAIMED}
NAMES = [field.name for field in fields(Quarantined)]
FACTS = [DERIVED[name].label(name) if name in DERIVED else WEBHOOK[name] for name in NAMES]

READ_STORES = Statement(
    select(
        exists().where(stores.c.merchant_id == bindparam("merchant")).label("has_stores"),
        exists()
        .where(stores.c.store_id == bindparam("store"), stores.c.merchant_id == bindparam("merchant"))
        .label("has_this_store"),
    )
)
# A merchant's own webhooks of a release that kept all of them by their merchant may be in either.
FIND_BODY = Statement(
    select(
        WEBHOOK.quarantine_id,
        WEBHOOK.merchant_id,
        CLAIMED.label("claimed"),
        WEBHOOK.topic,
        WEBHOOK.state,
        WEBHOOK.is_contested,
        WEBHOOK.last_received_at_ms,
    )
    .where(
        WEBHOOK.body_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))),
        WEBHOOK.merchant_id.in_([bindparam("claimed"), bindparam("merchant")]),
        or_(WEBHOOK.merchant_id == bindparam("merchant"), WEBHOOK.claimed_merchant_id.is_(None)),
    )
    .order_by(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
    .limit(1)
)
# Where the copies of a webhook that waits name different topics, it names none.
NOTE_REPETITION = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK)
    .values(
        receive_count=WEBHOOK.receive_count + bindparam("count", type_=BigInteger),
        last_received_at_ms=func.greatest(WEBHOOK.last_received_at_ms, bindparam("received", type_=BigInteger)),
        topic=case(
            (
                or_(WEBHOOK.topic == bindparam("topic"), WEBHOOK.state != QuarantineState.QUARANTINED.value),
                WEBHOOK.topic,
            ),
            else_=NO_TOPIC,
        ),
        is_contested=or_(WEBHOOK.is_contested, bindparam("claimed") != CLAIMED),
    )
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
    .on_conflict_do_nothing()
)
LOCATE_WEBHOOK = Statement(select(WEBHOOK.merchant_id).where(WEBHOOK.quarantine_id == bindparam("id"), BOTH, CLAIMS))
DELETE_WEBHOOK = Statement(delete(quarantined_webhooks).where(IS_WEBHOOK).returning(WEBHOOK.reason, WEBHOOK.kept_bytes))
READ_WEBHOOK = Statement(
    select(*FACTS, WEBHOOK.merchant_id.label("kept_by"), WEBHOOK.key_id, WEBHOOK.headers, WEBHOOK.body).where(
        WEBHOOK.quarantine_id == bindparam("id"), BOTH, CLAIMS
    )
)
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
    .where(
        IS_WEBHOOK, WEBHOOK.replay_event_id == bindparam("event"), WEBHOOK.state == QuarantineState.QUARANTINED.value
    )
    .values(
        replays_running=WEBHOOK.replays_running - 1,
        replay_event_id=case((WEBHOOK.replays_running > 1, WEBHOOK.replay_event_id)),
        replay_until_ms=case((WEBHOOK.replays_running > 1, WEBHOOK.replay_until_ms), else_=0),
    )
)
HAS_BODY = select(WEBHOOK.quarantine_id, func.octet_length(WEBHOOK.body).label("size")).order_by(WEBHOOK.quarantine_id)
FIND_ABOUT = Statement(HAS_BODY.where(TELLS_OF).limit(1))
LOCK_ABOUT = Statement(HAS_BODY.where(TELLS_OF).limit(bindparam("limit")).with_for_update())
FIND_OF_STORE = Statement(HAS_BODY.where(IS_OF_STORE).limit(1))
LOCK_OF_STORE = Statement(HAS_BODY.where(IS_OF_STORE).limit(bindparam("limit")).with_for_update())
COUNT_OF_STORE = Statement(select(func.count().label("webhooks")).select_from(quarantined_webhooks).where(IS_OF_STORE))
# Copies that name another merchant count against the proof, whatever became of them.
COUNT_PROOFS = Statement(
    select(
        func.count()
        .filter(
            bindparam("claimed") == CLAIMED,
            WEBHOOK.reason == QuarantineReason.STORE_UNKNOWN.value,
            WEBHOOK.state == QuarantineState.QUARANTINED.value,
        )
        .label("proofs"),
        func.count().filter(or_(bindparam("claimed") != CLAIMED, WEBHOOK.is_contested)).label("contests"),
    ).where(
        WEBHOOK.signed_store_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))),
        WEBHOOK.merchant_id == SHARED,
    )
)
# What a webhook was replayed as is a digest of its content, so that it goes with the body.
ERASE_BODIES = Statement(
    update(quarantined_webhooks)
    .where(
        WEBHOOK.quarantine_id == any_(bindparam("ids", type_=ARRAY(Text))), WEBHOOK.merchant_id == bindparam("merchant")
    )
    .values(
        body=None,
        kept_bytes=func.octet_length(WEBHOOK.headers),
        replay_event_id=case((WEBHOOK.state == QuarantineState.REPLAYED.value, ERASED), else_=WEBHOOK.replay_event_id),
    )
)
FREE_BYTES = Statement(
    update(quarantine_usage).where(IS_MERCHANT).values(bytes=USAGE.bytes - bindparam("size", type_=BigInteger))
)
MARK_REPLAYED = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK, WEBHOOK.replay_event_id == bindparam("event"))
    .values(
        state=QuarantineState.REPLAYED.value,
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
        BOTH,
        CLAIMS,
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
class QuarantineFilter:
    """Which webhooks of a merchant to list; None keeps all."""

    state: QuarantineState
    reason: QuarantineReason | None
    topic: str | None
    start_ms: int
    end_ms: int


class QuarantineTransactions:
    """Reads and writes the quarantine."""

    def __init__(self, database: Database, sealer: PayloadCipher, limits: Limits, metrics: Metrics) -> None:
        self._database = database
        self._sealer = sealer
        self._limits = limits
        self._quota = Quota(database, limits.total, metrics)

    async def keep(self, webhook: Webhook) -> tuple[str, bool] | None:
        """Keep a webhook, or note its repetition; None where the quarantine is full.

        Returns its id and whether it was there, after it is committed. Raises KEY_NOT_CONFIGURED where there is no key
        for a customer webhook, or for one without a topic.
        """
        digests = self._sealer.digests(webhook)
        async with self._database.autocommit() as connection:
            place, bounds = await self._place(connection, webhook)
            known = {"digests": digests, "claimed": webhook.merchant_id, "merchant": place}
            if found := await connection.fetch_one(FIND_BODY, known):
                await _note_repetition(connection, found, webhook)
                return found.quarantine_id, True
        quarantine_id = new_quarantine_id()
        sealed = self._sealer.seal(webhook, place, quarantine_id)
        row = _to_row(webhook, place, quarantine_id, digests[0], sealed) | self._names_of(webhook)

        async def work(connection: Connection) -> tuple[str, bool] | None:
            has_space = await _take_space(connection, place, sealed.size, bounds)
            # Another call may just have kept it, and taken the last space with it.
            if found := await connection.fetch_one(FIND_BODY, known):
                if has_space:
                    await connection.execute(FREE_ROOM, {"merchant": place, "size": sealed.size})
                await _note_repetition(connection, found, webhook)
                return found.quarantine_id, True
            if not has_space:
                return None
            if not await connection.execute(INSERT_WEBHOOK, row):
                raise RetryTransactionError  # A server with other keys, or of an earlier release, has just kept it.
            return quarantine_id, False

        if not await self._quota.reserve(sealed.size):
            return None
        may_be_kept = True  # Unless it is answered otherwise: the caller may go away, or the database, before it is.
        try:
            kept = await self._database.transaction(work)
            may_be_kept = kept == (quarantine_id, False)
        finally:
            self._quota.settle(sealed.size, may_be_kept=may_be_kept)
        return kept

    async def refresh_metrics(self) -> None:
        """Show in the metrics how much all quarantines hold."""
        await self._quota.refresh()

    async def proves(self, connection: Connection, merchant_id: str, store_id: str) -> bool:
        """Return whether a webhook waits that names an unknown store in its signed body, and this merchant.

        The merchant is in a header that is not signed. So the webhook must be in the shared quarantine, where only
        tokens for all merchants such as the shim's put any, and no copy of it, nor any other webhook of the store
        there, may name another merchant.
        """
        digests = self._sealer.subject_digests(store_id)
        row = await connection.fetch_one(COUNT_PROOFS, {"digests": digests, "claimed": merchant_id})
        return row is not None and row.proofs > 0 and row.contests == 0

    async def webhooks(
        self, view: View, wanted: QuarantineFilter, *, after: tuple[int, str] | None, limit: int
    ) -> list[Quarantined]:
        """Read a page of a merchant's webhooks, behind a place, the oldest first."""
        after_ms, after_id = after or (wanted.start_ms, "")
        values = {
            **_found_by(view),
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

    async def get(self, view: View, quarantine_id: str) -> tuple[Quarantined, WebhookContent]:
        """Read a webhook with its content. Raises WEBHOOK_NOT_FOUND and CODE_KEY_UNKNOWN."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_WEBHOOK, _found_by(view) | {"id": quarantine_id})
        if row is None:
            raise webhook_not_found(quarantine_id)
        sealed = EncryptedPayload(row.key_id, row.headers, row.body)
        return _to_quarantined(row), self._sealer.open(sealed, row.kept_by, quarantine_id)

    async def claim(self, view: View, quarantine_id: str, event_id: str, now_ms: int, until_ms: int) -> Claim:
        """Claim a webhook for its replay as one event, until a time by which that replay has ended.

        Any number of replays may claim the same event, since the book takes it once. They are counted, so that a
        refusal frees the webhook only when no other one may be running; those that never told their end count until
        their time is over.

        Raises WEBHOOK_NOT_FOUND, and EVENT_ID_REUSED where the webhook is claimed for another event.
        """

        async def work(connection: Connection) -> Claim:
            named = await _locate(connection, view, quarantine_id)
            row = await connection.fetch_one(LOCK_WEBHOOK, named)
            if row is None:
                raise webhook_not_found(quarantine_id)
            if row.replay_event_id not in {None, event_id}:
                raise _replayed_otherwise(event_id)
            running = 1 if row.replay_until_ms <= now_ms else row.replays_running + 1
            await connection.execute(CLAIM_WEBHOOK, named | {"event": event_id, "running": running, "until": until_ms})
            return Claim(named["merchant"], quarantine_id, event_id, row.topic)

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

    async def drop(self, view: View, quarantine_id: str) -> QuarantineReason:
        """Delete a webhook and free its space; returns why it was in quarantine. Raises WEBHOOK_NOT_FOUND."""

        async def work(connection: Connection) -> QuarantineReason:
            named = await _locate(connection, view, quarantine_id)
            await connection.fetch_one(LOCK_USAGE, {"merchant": named["merchant"]})
            row = await connection.fetch_one(DELETE_WEBHOOK, named)
            if row is None:
                raise webhook_not_found(quarantine_id)
            await connection.execute(FREE_ROOM, {"merchant": named["merchant"], "size": row.kept_bytes})
            return QuarantineReason(row.reason)

        reason = await self._database.transaction(work)
        self._quota.expire()
        return reason

    async def erase(self, connection: Connection, merchant_id: str, buyer_ids: Iterable[str]) -> None:
        """Erase the bodies that tell of some buyers, inside the transaction that redacts them."""
        digests = [digest for buyer_id in buyer_ids for digest in self._sealer.subject_digests(buyer_id)]
        await self._erase(connection, merchant_id, FIND_ABOUT, LOCK_ABOUT, digests)

    async def erase_store(self, connection: Connection, merchant_id: str, store_id: str, limit: int) -> int:
        """Erase bodies of a store's customer webhooks, inside the transaction that erases it; returns how many."""
        digests = self._sealer.subject_digests(store_id)
        return await self._erase(connection, merchant_id, FIND_OF_STORE, LOCK_OF_STORE, digests, limit=limit)

    async def count_store(self, connection: Connection, merchant_id: str, store_id: str) -> int:
        """Count a store's customer webhooks that have a body."""
        digests, webhooks = self._sealer.subject_digests(store_id), 0
        for place in (SHARED, merchant_id):
            values = {"merchant": place, "claimed": merchant_id, "digests": digests}
            row = await connection.fetch_one(COUNT_OF_STORE, values)
            webhooks += 0 if row is None else int(row.webhooks)
        return webhooks

    async def _place(self, connection: Connection, webhook: Webhook) -> tuple[str, Bounds]:
        """Return in which quarantine a webhook belongs, and the bounds for it there.

        Webhooks that name a merchant without any store, as strangers can invent, fill half of the shared one at most.
        A token for some merchants shares nothing with others, so that it neither learns of their webhooks nor fills
        their space.
        """
        if webhook.names_merchant_itself:
            return webhook.merchant_id, self._limits.merchant
        values = {"merchant": webhook.merchant_id, "store": signed_store(webhook.body)}
        row = await connection.fetch_one(READ_STORES, values)
        if row is not None and row.has_this_store:
            return webhook.merchant_id, self._limits.merchant
        is_known = row is not None and row.has_stores
        return SHARED, self._limits.shared if is_known else self._limits.shared.half()

    def _names_of(self, webhook: Webhook) -> dict[str, bytes | None]:
        """Return the digests by which a webhook is found: of its customer, their store, and the store of its body."""
        names = {
            "subject_digest": subject_of(webhook.body),
            "store_digest": store_of(webhook),
            "signed_store_digest": signed_store(webhook.body),
        }
        return {column: self._sealer.subject_digests(name)[0] if name else None for column, name in names.items()}

    async def _erase(
        self,
        connection: Connection,
        merchant_id: str,
        find: Statement,
        lock: Statement,
        digests: list[bytes],
        *,
        limit: int | None = None,
    ) -> int:
        """Erase the bodies that a statement locks in both quarantines of a merchant, and return how many.

        The shared quarantine is locked only if it has any, so that merchants do not wait for each other's erasures.
        """
        erased = 0
        for place in (SHARED, merchant_id):
            wanted = {"merchant": place, "claimed": merchant_id, "digests": digests}
            if place == SHARED and await connection.fetch_one(find, wanted) is None:
                continue
            left = None if limit is None else limit - erased
            erased += await _erase_in(connection, place, lock, {**wanted, "limit": left})
        return erased


async def _erase_in(connection: Connection, place: str, lock: Statement, wanted: dict[str, object]) -> int:
    """Erase the bodies that a statement locks in one quarantine."""
    # Without a row to lock, the merchant's first webhook could come between the statements, or be missed.
    await connection.execute(OPEN_USAGE, {"merchant_id": place})
    await connection.fetch_one(LOCK_USAGE, {"merchant": place})
    found = await connection.fetch(lock, wanted)
    ids = [row.quarantine_id for row in found]
    await connection.execute(ERASE_BODIES, {"merchant": place, "ids": ids})
    await connection.execute(FREE_BYTES, {"merchant": place, "size": sum(row.size for row in found)})
    return len(ids)


async def _take_space(connection: Connection, place: str, size: int, bounds: Bounds) -> bool:
    """Count a new webhook in, if there is space; a quarantine's first ones open its count, of which one does."""
    values = {
        "merchant": place,
        "size": size,
        "webhooks_max": bounds.webhooks_max,
        "bytes_max": bounds.bytes_max,
    }
    if await connection.execute(TAKE_ROOM, values):
        return True
    await connection.execute(OPEN_USAGE, {"merchant_id": place})
    return bool(await connection.execute(TAKE_ROOM, values))


async def _note_repetition(connection: Connection, found: Row, webhook: Webhook) -> None:
    """Note what a copy of a webhook has that is new; a copy that came a moment before is not counted again."""
    is_counted = webhook.received_at_ms >= found.last_received_at_ms + RECOUNT_MS
    is_new = (found.state == QuarantineState.QUARANTINED and found.topic not in {NO_TOPIC, webhook.topic}) or (
        found.claimed != webhook.merchant_id and not found.is_contested
    )
    if is_counted or is_new:
        values = {
            "merchant": found.merchant_id,
            "id": found.quarantine_id,
            "count": int(is_counted),
            "received": webhook.received_at_ms if is_counted else found.last_received_at_ms,
            "topic": webhook.topic,
            "claimed": webhook.merchant_id,
        }
        await connection.execute(NOTE_REPETITION, values)


def _found_by(view: View) -> dict[str, object]:
    """Write which webhooks a caller finds as parameters of CLAIMS."""
    return {"claimed": view.merchant_id, "sees_contested": view.sees_contested}


async def _locate(connection: Connection, view: View, quarantine_id: str) -> dict[str, str]:
    """Name a webhook by the quarantine that has it. Raises WEBHOOK_NOT_FOUND."""
    row = await connection.fetch_one(LOCATE_WEBHOOK, _found_by(view) | {"id": quarantine_id})
    if row is None:
        raise webhook_not_found(quarantine_id)
    return {"merchant": row.merchant_id, "id": quarantine_id}


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


def _to_row(
    webhook: Webhook, place: str, quarantine_id: str, digest: bytes, sealed: EncryptedPayload
) -> dict[str, object]:
    return {
        "quarantine_id": quarantine_id,
        "merchant_id": place,
        "claimed_merchant_id": webhook.merchant_id,
        "is_contested": False,
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
        "state": QuarantineState.QUARANTINED.value,
        "replay_event_id": None,
        "replays_running": 0,
        "replay_until_ms": 0,
        "replayed_at_ms": None,
    }


def _to_quarantined(row: Row) -> Quarantined:
    read = Quarantined(**{name: row[name] for name in NAMES})
    return replace(read, reason=QuarantineReason(read.reason), state=QuarantineState(read.state))
