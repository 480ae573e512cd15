"""Translation between the messages of PointsService and the ledger's entities.

The read functions add violations to `fields`; their results are valid only after `fields.check()`.
"""

import re

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.ledger.expiring_points import ExpiringPosition
from pointbook_server.ledger.model import (
    POINTS_MAX,
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    EntryFilter,
    Event,
    Expiry,
    ReceivedEvent,
    StoredEntry,
    UpdateType,
    WebhookOrigin,
)
from pointbook_server.rpc.request_fields import (
    EVENT_ID_LENGTH_MAX,
    ID_LENGTH_MAX,
    NANOS_PER_MS,
    NANOS_PER_SECOND,
    PROGRAM_ID_MAX,
    SCENE_LENGTH_MAX,
    SCENES_MAX,
    TIME_MS_MAX,
    TIME_MS_MIN,
    YEAR_2000_MS,
    Fields,
    to_timestamp,
    write_timestamp,
)

WEBHOOK_ID_LENGTH_MAX = 128
SHOP_DOMAIN_LENGTH_MAX = 255
API_VERSION_LENGTH_MAX = 64
LOTS_MAX = 500
DRAWS_MAX = 500
UPDATES_MAX = 1_000
NEWEST_POSITION = (2**63 - 1, "")
"""The position before the newest entry."""
BEFORE_ALL_TIMES_MS = TIME_MS_MIN - 1
UPDATE_TYPES = {
    points_pb2.POINTS_UPDATE_TYPE_INCREASE: UpdateType.INCREASE,
    points_pb2.POINTS_UPDATE_TYPE_DECREASE: UpdateType.DECREASE,
}
OUTCOMES = {
    ApplyOutcome.APPLIED: points_pb2.APPLY_OUTCOME_APPLIED,
    ApplyOutcome.DUPLICATE: points_pb2.APPLY_OUTCOME_DUPLICATE,
    ApplyOutcome.LATE: points_pb2.APPLY_OUTCOME_LATE,
}
_VALID_TEXTS = re.compile(
    "\n".join(
        (
            *[f"[!-~]{{1,{ID_LENGTH_MAX}}}"] * 3,
            f"[!-~]{{1,{EVENT_ID_LENGTH_MAX}}}",
            f"[!-~]{{0,{WEBHOOK_ID_LENGTH_MAX}}}",
            f"[!-~]{{0,{SHOP_DOMAIN_LENGTH_MAX}}}",
            f"[!-~]{{0,{API_VERSION_LENGTH_MAX}}}",
        )
    )
)
"""The ids of an update's merchant, store, buyer and event, and the texts of its webhook, a line each."""
SCENE_PREFIX = "POINTS_UPDATE_SCENE_"
SCENE_NAMES = {
    number: name.removeprefix(SCENE_PREFIX) for name, number in points_pb2.PointsUpdateScene.items() if number
}
SCENES = {name: number for number, name in SCENE_NAMES.items()}


def read_update(update: points_pb2.PointsUpdate, now_ms: int, *, is_present: bool = True) -> ReceivedEvent:
    """Read an update with its webhook. Raises INVALID_FIELDS with all violations.

    Most updates are valid, and found to be so by a few tests; only the others are read field by field.
    """
    received = read_valid_update(update, now_ms)
    if received is not None:
        return received
    fields = Fields()
    fields.present("update", is_present=is_present)
    received = read_received_event(fields, update, now_ms)
    fields.check()
    return received


def read_valid_update(update: points_pb2.PointsUpdate, now_ms: int) -> ReceivedEvent | None:
    """Read an update that is valid as a whole.

    Return None if a field is wrong, or if only `read_received_event` can tell.
    """
    event_id, merchant_id = update.event_id, update.merchant_id
    store_id, buyer_id = update.store_id, update.buyer_id
    update_type = UPDATE_TYPES.get(update.update_type)
    scene = SCENE_NAMES.get(update.updated_scene)
    value = update.updated_value
    webhook = update.webhook
    origin = WebhookOrigin(webhook.webhook_id, webhook.shop_domain, webhook.api_version)
    balance = update.points_balance if update.HasField("points_balance") else None
    updated_at_ms = _valid_time_ms(update.updated_at, low=YEAR_2000_MS, high=now_ms + DAY_MS)
    is_increase = update_type is UpdateType.INCREASE
    expires_at_ms = None
    is_expiry_valid = True
    if update.HasField("points_expiry_time"):
        low = YEAR_2000_MS if is_increase else TIME_MS_MIN
        expires_at_ms = _valid_time_ms(update.points_expiry_time, low=low, high=TIME_MS_MAX)
        is_expiry_valid = expires_at_ms is not None
    if (
        update_type is None
        or scene is None
        or update.unrecognized_scene
        or not 0 <= value <= POINTS_MAX
        or not (balance is None or -POINTS_MAX <= balance <= POINTS_MAX)
        or updated_at_ms is None
        or not is_expiry_valid
        or not _VALID_TEXTS.fullmatch("\n".join((merchant_id, store_id, buyer_id, event_id, *origin)))
    ):
        return None
    event = Event(
        event_id=event_id,
        account_key=AccountKey(store_id, buyer_id),
        update_type=update_type,
        scene=scene,
        value=value,
        balance=balance,
        # SHOPLINE documents the expiry as irrelevant unless points increase.
        expires_at_ms=expires_at_ms if is_increase else None,
        updated_at_ms=updated_at_ms,
    )
    return ReceivedEvent(event, origin, now_ms, update.forget_refusal)


def _valid_time_ms(value: Timestamp, *, low: int, high: int) -> int | None:
    """Return a time in ms if it is a valid one in a range, else None."""
    nanos = value.nanos
    time_ms = value.seconds * 1_000 + nanos // NANOS_PER_MS
    return time_ms if 0 <= nanos < NANOS_PER_SECOND and low <= time_ms <= high else None


def read_received_event(fields: Fields, update: points_pb2.PointsUpdate, now_ms: int) -> ReceivedEvent:
    """Read an update with its webhook, field by field."""
    event = read_event(fields, "update", update, now_ms)
    webhook = _read_webhook(fields, "update.webhook", update.webhook)
    return ReceivedEvent(event, webhook, now_ms, update.forget_refusal)


def read_event(fields: Fields, path: str, update: points_pb2.PointsUpdate, now_ms: int) -> Event:
    """Read an event; `path` is the path of its fields in violations.

    Source: docs/reference/ledger.md#bounds.
    """
    fields.identifier(f"{path}.merchant_id", update.merchant_id)
    update_type = UPDATE_TYPES.get(update.update_type)
    if update_type is None:
        fields.wrong(f"{path}.update_type", "must be INCREASE or DECREASE")
    balance = None
    if update.HasField("points_balance"):
        balance = fields.integer(f"{path}.points_balance", update.points_balance, low=-POINTS_MAX, high=POINTS_MAX)
    expires_at_ms = None
    if update.HasField("points_expiry_time"):
        # SHOPLINE documents the expiry as irrelevant unless points increase.
        is_relevant = update_type is UpdateType.INCREASE
        low = YEAR_2000_MS if is_relevant else TIME_MS_MIN
        expiry_ms = fields.time_ms(f"{path}.points_expiry_time", update.points_expiry_time, low=low)
        expires_at_ms = expiry_ms if is_relevant else None
    updated_at_ms = now_ms
    if fields.present(f"{path}.updated_at", is_present=update.HasField("updated_at")):
        updated_at_ms = fields.time_ms(f"{path}.updated_at", update.updated_at, low=YEAR_2000_MS, high=now_ms + DAY_MS)
    return Event(
        event_id=fields.identifier(f"{path}.event_id", update.event_id, length_max=EVENT_ID_LENGTH_MAX),
        account_key=AccountKey(
            fields.identifier(f"{path}.store_id", update.store_id),
            fields.identifier(f"{path}.buyer_id", update.buyer_id),
        ),
        update_type=update_type or UpdateType.INCREASE,
        scene=_read_scene(fields, path, update),
        value=fields.integer(f"{path}.updated_value", update.updated_value, low=0, high=POINTS_MAX),
        balance=balance,
        expires_at_ms=expires_at_ms,
        updated_at_ms=updated_at_ms,
    )


def _read_scene(fields: Fields, path: str, update: points_pb2.PointsUpdate) -> str:
    """Return the scene's name, from the enum or from `unrecognized_scene`.

    Source: docs/reference/shopline-webhooks.md#unknown-scenes.
    """
    if update.updated_scene and update.unrecognized_scene:
        fields.wrong(f"{path}.unrecognized_scene", "must be empty when updated_scene is set")
    if update.updated_scene:
        name = SCENE_NAMES.get(update.updated_scene, "")
        if not name:
            fields.wrong(f"{path}.updated_scene", "is not a known scene; send its name in unrecognized_scene")
        return name
    if not update.unrecognized_scene:
        fields.wrong(f"{path}.updated_scene", "is required, unless unrecognized_scene names the scene")
    return fields.ascii(f"{path}.unrecognized_scene", update.unrecognized_scene, length_max=SCENE_LENGTH_MAX)


def _read_webhook(fields: Fields, path: str, webhook: points_pb2.WebhookMetadata) -> WebhookOrigin:
    return WebhookOrigin(
        fields.ascii(f"{path}.webhook_id", webhook.webhook_id, length_max=WEBHOOK_ID_LENGTH_MAX),
        fields.ascii(f"{path}.shop_domain", webhook.shop_domain, length_max=SHOP_DOMAIN_LENGTH_MAX),
        fields.ascii(f"{path}.api_version", webhook.api_version, length_max=API_VERSION_LENGTH_MAX),
    )


def read_account_key(
    fields: Fields, request: points_pb2.GetPointsAccountRequest | points_pb2.ListPointsEntriesRequest
) -> AccountKey:
    """Read the key of a request's account."""
    return AccountKey(fields.identifier("store_id", request.store_id), fields.identifier("buyer_id", request.buyer_id))


def read_entry_filter(fields: Fields, request: points_pb2.ListPointsEntriesRequest) -> EntryFilter:
    """Read the filter of the entries to list."""
    update_type = UPDATE_TYPES.get(request.update_type)
    if request.update_type and update_type is None:
        fields.wrong("update_type", "must be INCREASE or DECREASE, or unset")
    return EntryFilter(
        update_type=update_type,
        scenes=fields.each(
            "scenes",
            request.scenes,
            lambda path, name: fields.identifier(path, name, length_max=SCENE_LENGTH_MAX),
            count_max=SCENES_MAX,
        ),
        start_ms=fields.time_ms("start_time", request.start_time) if request.HasField("start_time") else None,
        end_ms=fields.time_ms("end_time", request.end_time) if request.HasField("end_time") else None,
    )


def read_event_ids(
    fields: Fields, request: points_pb2.VoidPointsEntriesRequest | points_pb2.UnvoidPointsEntriesRequest
) -> tuple[str, ...]:
    """Read the event_ids of the entries to void or unvoid."""
    return fields.each(
        "event_ids",
        request.event_ids,
        lambda path, event_id: fields.identifier(path, event_id, length_max=EVENT_ID_LENGTH_MAX),
        count_min=1,
        count_max=UPDATES_MAX,
    )


def check_stores(fields: Fields, request: points_pb2.ListExpiringPointsRequest) -> None:
    """Check that the request selects a store or a program."""
    if not fields.present("store_id", is_present=request.WhichOneof("stores") is not None):
        return
    if request.HasField("store_id"):
        fields.identifier("store_id", request.store_id)
    else:
        fields.integer("program_id", request.program_id, low=1, high=PROGRAM_ID_MAX)


def first_expiring_position(now_ms: int) -> tuple[int, int, str, str]:
    """Return the position before all expiring points.

    All pages count the holds that are open at `now_ms`.
    """
    return now_ms, BEFORE_ALL_TIMES_MS, "", ""


def read_expiring_position(position: tuple[int, int, str, str]) -> tuple[int, ExpiringPosition | None]:
    """Return the time of the first page, and the position to continue after.

    The latter is None for the first page.
    """
    now_ms, at_ms, store_id, buyer_id = position
    return now_ms, None if at_ms == BEFORE_ALL_TIMES_MS else ExpiringPosition(at_ms, store_id, buyer_id)


def read_expiry_times(
    fields: Fields, request: points_pb2.ListExpiringPointsRequest, now_ms: int, after: ExpiringPosition | None
) -> tuple[int, int]:
    """Return the start and the exclusive end of the expiries to list.

    By default, they start just after now.
    """
    start_ms = now_ms + 1
    if request.HasField("from_time"):
        start_ms = fields.time_ms("from_time", request.from_time)
    end_ms = start_ms + 1
    if fields.present("until_time", is_present=request.HasField("until_time")):
        end_ms = fields.time_ms("until_time", request.until_time)
    if after is not None and not start_ms <= after.at_ms < end_ms:
        fields.wrong("page_token", "must be a next_page_token from a response to the same request")
    elif end_ms <= start_ms:
        fields.wrong("until_time", "must be after from_time, or after now if from_time is absent")
    return start_ms, end_ms


def write_account(merchant_id: str, key: AccountKey, account: Account, at_ms: int) -> points_pb2.PointsAccount:
    """Build the message of an account at a time, without its lots."""
    message = points_pb2.PointsAccount()
    fill_account(message, merchant_id, key, account, at_ms)
    return message


def fill_account(
    message: points_pb2.PointsAccount, merchant_id: str, key: AccountKey, account: Account, at_ms: int
) -> None:
    """Fill an empty message with an account at a time, without its lots."""
    points = account.points_at(at_ms)
    message.merchant_id = merchant_id
    message.store_id, message.buyer_id = key
    message.points_balance = account.balance
    message.active_points, message.held_points, message.expired_points = points
    message.drift = account.drift
    message.silently_expired_points = account.silently_expired
    message.lifetime_points = account.lifetime_points
    as_of = message.as_of
    as_of.seconds, milliseconds = divmod(at_ms, 1_000)
    as_of.nanos = milliseconds * NANOS_PER_MS


def fill_account_of(
    response: points_pb2.ApplyPointsUpdateResponse, update: points_pb2.PointsUpdate, result: ApplyResult, at_ms: int
) -> None:
    """Fill the account of the response to an update."""
    key = AccountKey(update.store_id, update.buyer_id)
    fill_account(response.account, update.merchant_id, key, result.account, at_ms)


def write_account_with_expiry(
    merchant_id: str, key: AccountKey, account: Account, next_expiry: Expiry | None, at_ms: int, *, with_lots: bool
) -> points_pb2.PointsAccount:
    """Build the message of an account with its next expiry, and with its first lots."""
    message = write_account(merchant_id, key, account, at_ms)
    if with_lots:
        for lot in account.lots[:LOTS_MAX]:
            added = message.lots.add(
                remaining_points=lot.remaining, original_points=lot.original, event_id=lot.event_id
            )
            if lot.expires_at_ms is not None:
                write_timestamp(added.points_expiry_time, lot.expires_at_ms)
        message.lots_truncated = len(account.lots) > LOTS_MAX or account.overflow is not None
    if next_expiry is not None:
        message.next_expiry.points = next_expiry.points
        write_timestamp(message.next_expiry.time, next_expiry.at_ms)
    return message


def write_entry(merchant_id: str, stored: StoredEntry) -> points_pb2.PointsEntry:
    """Build the message of an entry."""
    entry = stored.entry
    return points_pb2.PointsEntry(
        update=_write_update(merchant_id, entry.event, stored.webhook),
        receive_time=to_timestamp(stored.received_at_ms),
        outcome=OUTCOMES[stored.outcome],
        balance_before=entry.balance_before,
        balance_after=entry.balance_after,
        drift=entry.drift,
        silently_expired=entry.silently_expired,
        scene_disagrees=entry.scene_disagrees,
        draws=[
            points_pb2.PointsDraw(
                event_id=draw.event_id,
                points=draw.points,
                points_expiry_time=_optional_timestamp(draw.expires_at_ms),
            )
            for draw in entry.draws[:DRAWS_MAX]
        ],
        draws_truncated=len(entry.draws) > DRAWS_MAX,
        void=None
        if stored.void is None
        else points_pb2.EntryVoid(reason=stored.void.reason, time=to_timestamp(stored.void.at_ms)),
        settled_redemption_id=stored.settled_redemption_id or "",
    )


def _write_update(merchant_id: str, event: Event, webhook: WebhookOrigin) -> points_pb2.PointsUpdate:
    update = points_pb2.PointsUpdate(
        event_id=event.event_id,
        merchant_id=merchant_id,
        store_id=event.account_key.store_id,
        buyer_id=event.account_key.buyer_id,
        update_type=_update_type_number(event.update_type),
        updated_scene=SCENES.get(event.scene, points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED),
        unrecognized_scene="" if event.scene in SCENES else event.scene,
        updated_value=event.value,
        points_balance=event.balance,
        points_expiry_time=_optional_timestamp(event.expires_at_ms),
        updated_at=to_timestamp(event.updated_at_ms),
    )
    if webhook != WebhookOrigin():
        update.webhook.webhook_id = webhook.webhook_id
        update.webhook.shop_domain = webhook.shop_domain
        update.webhook.api_version = webhook.api_version
    return update


def _update_type_number(update_type: UpdateType) -> points_pb2.PointsUpdateType.ValueType:
    if update_type is UpdateType.INCREASE:
        return points_pb2.POINTS_UPDATE_TYPE_INCREASE
    return points_pb2.POINTS_UPDATE_TYPE_DECREASE


def _optional_timestamp(time_ms: int | None) -> Timestamp | None:
    return None if time_ms is None else to_timestamp(time_ms)
