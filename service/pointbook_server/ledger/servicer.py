"""The gRPC face of the ledger."""

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_server import paging
from pointbook_server.clock import Clock
from pointbook_server.fields import DAY_MS, YEAR_2000_MS, Fields, to_timestamp
from pointbook_server.ledger.model import POINTS_MAX, Account, AccountKey, Event, Outcome, UpdateType, Webhook
from pointbook_server.ledger.store import BookEntry, EntryFilter, LedgerStore

EVENT_ID_LENGTH_MAX = 128
WEBHOOK_ID_LENGTH_MAX = 128
SHOP_DOMAIN_LENGTH_MAX = 255
API_VERSION_LENGTH_MAX = 64
SCENE_LENGTH_MAX = 64
SCENES_MAX = 100
LOTS_MAX = 500
UPDATE_TYPES = {
    points_pb2.POINTS_UPDATE_TYPE_INCREASE: UpdateType.INCREASE,
    points_pb2.POINTS_UPDATE_TYPE_DECREASE: UpdateType.DECREASE,
}
OUTCOMES = {
    Outcome.APPLIED: points_pb2.APPLY_OUTCOME_APPLIED,
    Outcome.DUPLICATE: points_pb2.APPLY_OUTCOME_DUPLICATE,
    Outcome.LATE: points_pb2.APPLY_OUTCOME_LATE,
}
SCENE_PREFIX = "POINTS_UPDATE_SCENE_"
SCENE_NAMES = {
    number: name.removeprefix(SCENE_PREFIX) for name, number in points_pb2.PointsUpdateScene.items() if number
}
SCENES = {name: number for number, name in SCENE_NAMES.items()}


class PointsServicer(points_pb2_grpc.PointsServiceServicer):
    """PointsService: each method reads its request, asks the store, and writes the answer."""

    def __init__(self, store: LedgerStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def ApplyPointsUpdate(
        self,
        request: points_pb2.ApplyPointsUpdateRequest,
        _context: object,
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Write one event into the book."""
        now_ms = self._clock()
        fields = Fields()
        fields.present("update", is_present=request.HasField("update"))
        event = read_event(fields, "update", request.update, now_ms)
        webhook = _read_webhook(fields, "update.webhook", request.update.webhook)
        fields.check()
        merchant_id = request.update.merchant_id
        verdict = await self._store.apply(merchant_id, event, webhook, now_ms)
        return points_pb2.ApplyPointsUpdateResponse(
            outcome=OUTCOMES[verdict.outcome],
            account=_write_account(merchant_id, event.account, verdict.account, now_ms),
            drift=verdict.entry.drift,
        )

    async def GetPointsAccount(
        self,
        request: points_pb2.GetPointsAccountRequest,
        _context: object,
    ) -> points_pb2.GetPointsAccountResponse:
        """Answer an account with its lots."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        key = _read_key(fields, request)
        at_ms = fields.time_ms("at_time", request.at_time) if request.HasField("at_time") else self._clock()
        fields.check()
        account = await self._store.account(request.merchant_id, key)
        message = _write_account(request.merchant_id, key, account, at_ms)
        lots = account.lots_by_expiry()
        for lot in lots[:LOTS_MAX]:
            message.lots.add(
                remaining_points=lot.remaining,
                original_points=lot.original,
                points_expiry_time=_optional_timestamp(lot.expires_at_ms),
                event_id=lot.event_id,
            )
        message.lots_truncated = len(lots) > LOTS_MAX
        return points_pb2.GetPointsAccountResponse(account=message)

    async def ListPointsEntries(
        self,
        request: points_pb2.ListPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.ListPointsEntriesResponse:
        """Answer a page of an account's entries."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        key = _read_key(fields, request)
        wanted = _read_filter(fields, request)
        size = fields.page_size("page_size", request.page_size)
        scope = (request.merchant_id, key.store_id, key.buyer_id, wanted)
        place = paging.read_token(fields, "page_token", request.page_token, scope, (int, int))
        fields.check()
        before = None if place is None else (int(place[0]), int(place[1]))
        found = await self._store.entries(request.merchant_id, key, wanted, before=before, limit=size + 1)
        page = paging.fit((_write_entry(request.merchant_id, entry) for entry in found), size)
        response = points_pb2.ListPointsEntriesResponse(entries=page)
        if len(found) > len(page):
            last = found[len(page) - 1].entry
            response.next_page_token = paging.write_token(scope, (last.event.updated_at_ms, last.ordinal))
        return response


def read_event(fields: Fields, path: str, update: points_pb2.PointsUpdate, now_ms: int) -> Event:
    """Read an event, and note what is wrong with it under its path."""
    fields.identifier(f"{path}.merchant_id", update.merchant_id)
    update_type = UPDATE_TYPES.get(update.update_type)
    if update_type is None:
        fields.wrong(f"{path}.update_type", "must be INCREASE or DECREASE")
    balance = None
    if update.HasField("points_balance"):
        balance = fields.integer(f"{path}.points_balance", update.points_balance, low=-POINTS_MAX, high=POINTS_MAX)
    expires_at_ms = None
    if update.HasField("points_expiry_time"):
        expires_at_ms = fields.time_ms(f"{path}.points_expiry_time", update.points_expiry_time)
    updated_at_ms = now_ms
    if fields.present(f"{path}.updated_at", is_present=update.HasField("updated_at")):
        updated_at_ms = fields.time_ms(f"{path}.updated_at", update.updated_at, low=YEAR_2000_MS, high=now_ms + DAY_MS)
    return Event(
        event_id=fields.identifier(f"{path}.event_id", update.event_id, length_max=EVENT_ID_LENGTH_MAX),
        account=AccountKey(
            fields.identifier(f"{path}.store_id", update.store_id),
            fields.identifier(f"{path}.buyer_id", update.buyer_id),
        ),
        update_type=update_type or UpdateType.INCREASE,
        scene=_read_scene(fields, path, update),
        value=fields.integer(f"{path}.updated_value", update.updated_value, low=0, high=POINTS_MAX),
        balance=balance,
        # SHOPLINE calls the expiry irrelevant unless points increase.
        expires_at_ms=expires_at_ms if update_type is UpdateType.INCREASE else None,
        updated_at_ms=updated_at_ms,
    )


def _read_scene(fields: Fields, path: str, update: points_pb2.PointsUpdate) -> str:
    """Read the scene's name, from the enum or as it stands."""
    if update.updated_scene and update.unrecognized_scene:
        fields.wrong(f"{path}.unrecognized_scene", "must be empty when updated_scene is set")
    if update.updated_scene:
        name = SCENE_NAMES.get(update.updated_scene, "")
        if not name:
            fields.wrong(
                f"{path}.updated_scene", "is no scene that this server knows; send its name in unrecognized_scene"
            )
        return name
    if not update.unrecognized_scene:
        fields.wrong(f"{path}.updated_scene", "is required, unless unrecognized_scene names the scene")
    return fields.ascii(f"{path}.unrecognized_scene", update.unrecognized_scene, length_max=SCENE_LENGTH_MAX)


def _read_webhook(fields: Fields, path: str, webhook: points_pb2.WebhookMetadata) -> Webhook:
    return Webhook(
        fields.ascii(f"{path}.webhook_id", webhook.webhook_id, length_max=WEBHOOK_ID_LENGTH_MAX),
        fields.ascii(f"{path}.shop_domain", webhook.shop_domain, length_max=SHOP_DOMAIN_LENGTH_MAX),
        fields.ascii(f"{path}.api_version", webhook.api_version, length_max=API_VERSION_LENGTH_MAX),
    )


def _read_key(
    fields: Fields, request: points_pb2.GetPointsAccountRequest | points_pb2.ListPointsEntriesRequest
) -> AccountKey:
    return AccountKey(fields.identifier("store_id", request.store_id), fields.identifier("buyer_id", request.buyer_id))


def _read_filter(fields: Fields, request: points_pb2.ListPointsEntriesRequest) -> EntryFilter:
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


def _write_account(merchant_id: str, key: AccountKey, account: Account, at_ms: int) -> points_pb2.PointsAccount:
    """Write an account as of a moment, without its lots."""
    return points_pb2.PointsAccount(
        merchant_id=merchant_id,
        store_id=key.store_id,
        buyer_id=key.buyer_id,
        points_balance=account.balance,
        active_points=account.active_points(at_ms),
        expired_points=account.expired_points(at_ms),
        drift=account.drift,
        silently_expired_points=account.silently_expired,
        lifetime_points=account.lifetime_points,
        as_of=to_timestamp(at_ms),
    )


def _write_entry(merchant_id: str, received: BookEntry) -> points_pb2.PointsEntry:
    entry = received.entry
    event = entry.event
    webhook = received.webhook
    update = points_pb2.PointsUpdate(
        event_id=event.event_id,
        merchant_id=merchant_id,
        store_id=event.account.store_id,
        buyer_id=event.account.buyer_id,
        update_type=_update_type_number(event.update_type),
        updated_scene=SCENES.get(event.scene, points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED),
        unrecognized_scene="" if event.scene in SCENES else event.scene,
        updated_value=event.value,
        points_balance=event.balance,
        points_expiry_time=_optional_timestamp(event.expires_at_ms),
        updated_at=to_timestamp(event.updated_at_ms),
    )
    if webhook != Webhook():
        update.webhook.webhook_id = webhook.webhook_id
        update.webhook.shop_domain = webhook.shop_domain
        update.webhook.api_version = webhook.api_version
    return points_pb2.PointsEntry(
        update=update,
        receive_time=to_timestamp(received.received_at_ms),
        outcome=OUTCOMES[received.outcome],
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
            for draw in entry.draws
        ],
    )


def _update_type_number(update_type: UpdateType) -> points_pb2.PointsUpdateType.ValueType:
    if update_type is UpdateType.INCREASE:
        return points_pb2.POINTS_UPDATE_TYPE_INCREASE
    return points_pb2.POINTS_UPDATE_TYPE_DECREASE


def _optional_timestamp(time_ms: int | None) -> Timestamp | None:
    return None if time_ms is None else to_timestamp(time_ms)
