"""SQL of the quarantine, and the codecs of its rows.

The `merchant_id` of a row is the webhook's owner: the merchant whose quarantine stores it, or SHARED. A merchant owns a
webhook only if its signed body names one of the merchant's stores, or if the caller's token is limited to some
merchants. All other webhooks are in the shared quarantine, with the merchant that their header named in
`claimed_merchant_id`. Each owner stores a body once, even if its headers differ, so one captured body takes at most two
rows, even if it is sent many times and for many merchants.

Transactions lock the usage row of SHARED before a merchant's, and usage rows before webhooks, so they cannot deadlock.
"""

from dataclasses import fields, replace
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
    cast,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.db.aging_tables import AgingTable
from pointbook_server.db.database import Row, Statement
from pointbook_server.db.tables import quarantine_usage, quarantined_webhooks, stores
from pointbook_server.webhooks.encryption import EncryptedPayload
from pointbook_server.webhooks.model import (
    NO_TOPIC,
    SHARED,
    QuarantinedWebhook,
    QuarantineReason,
    QuarantineState,
    Webhook,
)

WEBHOOK = quarantined_webhooks.c
USAGE = quarantine_usage.c
IS_WEBHOOK = and_(WEBHOOK.quarantine_id == bindparam("id"), WEBHOOK.merchant_id == bindparam("owner"))
IS_OWNERS_USAGE = USAGE.merchant_id == bindparam("owner")
CLAIMED = func.coalesce(WEBHOOK.claimed_merchant_id, WEBHOOK.merchant_id)
"""The merchant that a webhook's header named. Rows of earlier releases are owned by that merchant."""
IS_VISIBLE = or_(
    WEBHOOK.merchant_id == bindparam("claimed"),
    and_(bindparam("claimed") == CLAIMED, or_(~WEBHOOK.is_contested, bindparam("sees_contested", type_=Boolean))),
)
"""The webhooks that a merchant may see: its own, and those in the shared quarantine that name it."""
IS_OWNED_OR_SHARED = WEBHOOK.merchant_id.in_([bindparam("claimed"), SHARED])
# If the merchant of a shared copy is in doubt, the copy is erased for each merchant that it may belong to: one that
# names no merchant, or a merchant without stores, may be a captured copy of any merchant's webhook.
MAY_BE_MERCHANTS = and_(
    WEBHOOK.merchant_id == bindparam("owner"),
    or_(
        bindparam("claimed") == CLAIMED,
        WEBHOOK.is_contested,
        ~exists().where(stores.c.merchant_id == CLAIMED),
    ),
    WEBHOOK.body.is_not(None),
)
IS_ABOUT_BUYERS = and_(WEBHOOK.subject_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))), MAY_BE_MERCHANTS)
IS_OF_STORE = and_(WEBHOOK.store_digest == any_(bindparam("digests", type_=ARRAY(LargeBinary))), MAY_BE_MERCHANTS)
ERASED = "erased"
"""The replay_event_id of a replayed webhook whose body was erased."""
FINISHED_WEBHOOKS = AgingTable(
    "quarantined_webhooks",
    ("quarantine_id",),
    time="greatest(last_received_at_ms, replayed_at_ms)",
    is_indexed="(state = 'REPLAYED' OR body IS NULL)",
)
"""The webhooks that were replayed, or whose body was erased."""
COMPUTED_COLUMNS = {"body_erased": WEBHOOK.body.is_(None), "merchant_id": CLAIMED}
ENTITY_FIELDS = [field.name for field in fields(QuarantinedWebhook)]
ENTITY_COLUMNS = [
    COMPUTED_COLUMNS[name].label(name) if name in COMPUTED_COLUMNS else WEBHOOK[name] for name in ENTITY_FIELDS
]

SUM_USAGE = Statement(
    select(
        cast(func.coalesce(func.sum(USAGE.webhooks), 0), BigInteger).label("webhooks"),
        cast(func.coalesce(func.sum(USAGE.bytes), 0), BigInteger).label("bytes"),
    )
)
LIST_USAGE = Statement(select(USAGE.merchant_id, USAGE.webhooks, USAGE.bytes).where(USAGE.webhooks > 0))
COUNT_BY_REASON = Statement(
    select(
        WEBHOOK.reason,
        func.count().label("webhooks"),
        func.min(WEBHOOK.received_at_ms).label("oldest_at_ms"),
    )
    .where(WEBHOOK.state == bindparam("state"))
    .group_by(WEBHOOK.reason)
)
READ_STORES = Statement(
    select(
        exists().where(stores.c.merchant_id == bindparam("merchant")).label("has_stores"),
        exists()
        .where(stores.c.store_id == bindparam("store"), stores.c.merchant_id == bindparam("merchant"))
        .label("has_this_store"),
    )
)
# Earlier releases stored all webhooks under their merchant, so the merchant's own rows are searched too.
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
        WEBHOOK.merchant_id.in_([bindparam("claimed"), bindparam("owner")]),
        or_(WEBHOOK.merchant_id == bindparam("owner"), WEBHOOK.claimed_merchant_id.is_(None)),
    )
    .order_by(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
    .limit(1)
)
# A webhook that was not replayed loses its topic if its copies name different ones.
COUNT_REPETITION = Statement(
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
INSERT_USAGE = Statement(
    insert(quarantine_usage)
    .values(merchant_id=bindparam("owner"), webhooks=0, bytes=0)
    .on_conflict_do_nothing(constraint="pk_quarantine_usage")
)
LOCK_USAGE = Statement(select(USAGE.merchant_id).where(IS_OWNERS_USAGE).with_for_update())
LOCK_FREE_USAGE = Statement(select(USAGE.merchant_id).where(IS_OWNERS_USAGE).with_for_update(skip_locked=True))
# A transaction that finds space keeps the row locked until its webhook is committed.
RESERVE_SPACE = Statement(
    update(quarantine_usage)
    .where(
        IS_OWNERS_USAGE,
        USAGE.webhooks < bindparam("webhooks_max"),
        USAGE.bytes + bindparam("size", type_=BigInteger) <= bindparam("bytes_max"),
    )
    .values(webhooks=USAGE.webhooks + 1, bytes=USAGE.bytes + bindparam("size", type_=BigInteger))
    .returning(USAGE.merchant_id)
)
RELEASE_SPACE = Statement(
    update(quarantine_usage)
    .where(IS_OWNERS_USAGE)
    .values(
        webhooks=USAGE.webhooks - bindparam("webhooks", 1, type_=BigInteger),
        bytes=USAGE.bytes - bindparam("size", type_=BigInteger),
    )
)
RELEASE_BYTES = Statement(
    update(quarantine_usage).where(IS_OWNERS_USAGE).values(bytes=USAGE.bytes - bindparam("size", type_=BigInteger))
)
INSERT_WEBHOOK = Statement(
    insert(quarantined_webhooks)
    .values({column.name: bindparam(column.name) for column in WEBHOOK})
    .on_conflict_do_nothing()
    .returning(WEBHOOK.quarantine_id)
)
FIND_OWNER = Statement(
    select(WEBHOOK.merchant_id).where(WEBHOOK.quarantine_id == bindparam("id"), IS_OWNED_OR_SHARED, IS_VISIBLE)
)
DELETE_FINISHED = Statement(FINISHED_WEBHOOKS.delete_sql(returning="kept_bytes"))
DELETE_WEBHOOK = Statement(delete(quarantined_webhooks).where(IS_WEBHOOK).returning(WEBHOOK.reason, WEBHOOK.kept_bytes))
READ_WEBHOOK = Statement(
    select(*ENTITY_COLUMNS, WEBHOOK.merchant_id.label("owner_id"), WEBHOOK.key_id, WEBHOOK.headers, WEBHOOK.body).where(
        WEBHOOK.quarantine_id == bindparam("id"), IS_OWNED_OR_SHARED, IS_VISIBLE
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
# Only the last replay to end releases the webhook: the others may still apply the event.
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
MARK_REPLAYED = Statement(
    update(quarantined_webhooks)
    .where(IS_WEBHOOK, WEBHOOK.replay_event_id == bindparam("event"))
    .values(
        state=QuarantineState.REPLAYED.value,
        replayed_at_ms=func.coalesce(WEBHOOK.replayed_at_ms, bindparam("now", type_=BigInteger)),
    )
    .returning(WEBHOOK.replayed_at_ms)
)
SELECT_BODIES = select(WEBHOOK.quarantine_id, func.octet_length(WEBHOOK.body).label("size")).order_by(
    WEBHOOK.quarantine_id
)
FIND_BUYERS_BODY = Statement(SELECT_BODIES.where(IS_ABOUT_BUYERS).limit(1))
LOCK_BUYERS_BODIES = Statement(SELECT_BODIES.where(IS_ABOUT_BUYERS).limit(bindparam("limit")).with_for_update())
FIND_STORES_BODY = Statement(SELECT_BODIES.where(IS_OF_STORE).limit(1))
LOCK_STORES_BODIES = Statement(SELECT_BODIES.where(IS_OF_STORE).limit(bindparam("limit")).with_for_update())
COUNT_STORES_BODIES = Statement(
    select(func.count().label("webhooks")).select_from(quarantined_webhooks).where(IS_OF_STORE)
)
# Copies that name another merchant count against the proof in every state.
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
# The event id of a replay may be a digest of the body, so it is erased with the body.
ERASE_BODIES = Statement(
    update(quarantined_webhooks)
    .where(
        WEBHOOK.quarantine_id == any_(bindparam("ids", type_=ARRAY(Text))), WEBHOOK.merchant_id == bindparam("owner")
    )
    .values(
        body=None,
        kept_bytes=func.octet_length(WEBHOOK.headers),
        replay_event_id=case((WEBHOOK.state == QuarantineState.REPLAYED.value, ERASED), else_=WEBHOOK.replay_event_id),
    )
)


def _equals_unless_null(column: Any, name: str) -> Any:
    """Compare a column with a parameter; a parameter of NULL matches every row."""
    parameter = bindparam(name, type_=Text)
    return or_(parameter.is_(None), column == parameter)


LIST_WEBHOOKS = Statement(
    select(*ENTITY_COLUMNS)
    .where(
        IS_OWNED_OR_SHARED,
        IS_VISIBLE,
        WEBHOOK.state == bindparam("filter_state"),
        tuple_(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
        > tuple_(bindparam("after_ms", type_=BigInteger), bindparam("after_id", type_=Text)),
        WEBHOOK.received_at_ms < bindparam("end_ms", type_=BigInteger),
        _equals_unless_null(WEBHOOK.reason, "filter_reason"),
        _equals_unless_null(WEBHOOK.topic, "filter_topic"),
    )
    .order_by(WEBHOOK.received_at_ms, WEBHOOK.quarantine_id)
    .limit(bindparam("limit"))
)


def to_row(
    webhook: Webhook, owner_id: str, quarantine_id: str, body_digest: bytes, payload: EncryptedPayload
) -> dict[str, object]:
    """Convert a new webhook to its row, without the digests for look-ups."""
    return {
        "quarantine_id": quarantine_id,
        "merchant_id": owner_id,
        "claimed_merchant_id": webhook.merchant_id,
        "is_contested": False,
        "reason": webhook.reason.value,
        "body_digest": body_digest,
        "detail": webhook.detail,
        "topic": webhook.topic,
        "key_id": payload.key_id,
        "headers": payload.headers,
        "body": payload.body,
        "body_size": len(webhook.body),
        "kept_bytes": payload.size,
        "received_at_ms": webhook.received_at_ms,
        "last_received_at_ms": webhook.received_at_ms,
        "receive_count": 1,
        "state": QuarantineState.QUARANTINED.value,
        "replay_event_id": None,
        "replays_running": 0,
        "replay_until_ms": 0,
        "replayed_at_ms": None,
    }


def to_quarantined_webhook(row: Row) -> QuarantinedWebhook:
    """Convert a row with ENTITY_COLUMNS to a webhook."""
    webhook = QuarantinedWebhook(**{name: row[name] for name in ENTITY_FIELDS})
    return replace(webhook, reason=QuarantineReason(webhook.reason), state=QuarantineState(webhook.state))
