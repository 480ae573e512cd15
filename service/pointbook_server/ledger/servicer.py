"""The gRPC face of the ledger."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.expiring_points import ExpiryWindow, Place
from pointbook_server.ledger.model import (
    POINTS_MAX,
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    UpdateType,
    WebhookOrigin,
)
from pointbook_server.ledger.queries import StoredEntry, Void
from pointbook_server.ledger.transactions import EntryFilter, LedgerTransactions, ReceivedEvent
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Program, Store, program_not_found
from pointbook_server.rpc import pagination
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, TIME_MS_MIN, YEAR_2000_MS, Fields, to_timestamp

EVENT_ID_LENGTH_MAX = 128
WEBHOOK_ID_LENGTH_MAX = 128
SHOP_DOMAIN_LENGTH_MAX = 255
API_VERSION_LENGTH_MAX = 64
SCENE_LENGTH_MAX = 64
SCENES_MAX = 100
LOTS_MAX = 500
DRAWS_MAX = 500
UPDATES_MAX = 1_000
VIOLATIONS_MAX = 50
REASON_LENGTH_MAX = 500
UPDATE_TYPES = {
    points_pb2.POINTS_UPDATE_TYPE_INCREASE: UpdateType.INCREASE,
    points_pb2.POINTS_UPDATE_TYPE_DECREASE: UpdateType.DECREASE,
}
OUTCOMES = {
    ApplyOutcome.APPLIED: points_pb2.APPLY_OUTCOME_APPLIED,
    ApplyOutcome.DUPLICATE: points_pb2.APPLY_OUTCOME_DUPLICATE,
    ApplyOutcome.LATE: points_pb2.APPLY_OUTCOME_LATE,
}
SCENE_PREFIX = "POINTS_UPDATE_SCENE_"
SCENE_NAMES = {
    number: name.removeprefix(SCENE_PREFIX) for name, number in points_pb2.PointsUpdateScene.items() if number
}
SCENES = {name: number for number, name in SCENE_NAMES.items()}

log = structlog.get_logger()


class Programs(Protocol):
    """Where stores and programs are kept."""

    async def read_store(self, merchant_id: str, store_id: str) -> tuple[Store, int]:
        """Read one store and its revision. Raises STORE_NOT_FOUND."""

    async def read_program(self, merchant_id: str, program_id: int) -> tuple[Program, int] | None:
        """Read one program and its revision."""


class PointsServicer(points_pb2_grpc.PointsServiceServicer):
    """PointsService: each method reads its request, asks the store, and writes the answer.

    Updates wait in `line` for the transaction that they share; `grpc_code` tells the gRPC code of an error's reason.
    """

    def __init__(
        self,
        store: LedgerTransactions,
        programs: Programs,
        line: Batcher[str, ReceivedEvent, ApplyResult],
        clock: Clock,
        *,
        grpc_code: Callable[[Reason], grpc.StatusCode],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._programs = programs
        self._batcher = line
        self._clock = clock
        self._grpc_code = grpc_code
        self._metrics = metrics

    async def ApplyPointsUpdate(
        self,
        request: points_pb2.ApplyPointsUpdateRequest,
        _context: object,
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Write one event into the book."""
        now_ms = self._clock()
        fields = Fields()
        fields.present("update", is_present=request.HasField("update"))
        received = _read_received(fields, request.update, now_ms)
        fields.check()
        self._batcher.check_capacity(1)
        (answer,) = self._batcher.submit(request.update.merchant_id, [received])
        verdict = await answer
        if isinstance(verdict, PointbookError):
            raise verdict
        return self._write_verdict(request.update, verdict, now_ms)

    async def BatchApplyPointsUpdates(
        self,
        request: points_pb2.BatchApplyPointsUpdatesRequest,
        _context: object,
    ) -> points_pb2.BatchApplyPointsUpdatesResponse:
        """Write events into the book, and answer each by itself."""
        now_ms = self._clock()
        fields = Fields()
        if not 1 <= len(request.updates) <= UPDATES_MAX:
            fields.wrong("updates", f"must have 1 to {UPDATES_MAX:,} items")
        fields.check()
        answers = await self._post([_read_update(update, now_ms) for update in request.updates])
        response = points_pb2.BatchApplyPointsUpdatesResponse()
        for update, answer in zip(request.updates, answers, strict=True):
            if isinstance(answer, ApplyResult):
                response.results.add(response=self._write_verdict(update, answer, now_ms))
            else:
                response.results.add(error=self._write_error(answer))
        return response

    async def _post(
        self, updates: Sequence[tuple[str, ReceivedEvent] | PointbookError]
    ) -> list[ApplyResult | BaseException]:
        """Let the updates that were read well wait in line, each merchant's together, and answer all in their order."""
        answers: dict[int, ApplyResult | BaseException] = {}
        batches: defaultdict[str, dict[int, ReceivedEvent]] = defaultdict(dict)
        for place, update in enumerate(updates):
            if isinstance(update, PointbookError):
                answers[place] = update
            else:
                merchant_id, received = update
                batches[merchant_id][place] = received
        self._batcher.check_capacity(sum(map(len, batches.values())))
        waiting: dict[int, asyncio.Future[ApplyResult | PointbookError]] = {}
        for merchant_id, batch in batches.items():
            waiting |= zip(batch, self._batcher.submit(merchant_id, list(batch.values())), strict=True)
        answered = await asyncio.gather(*waiting.values(), return_exceptions=True)
        answers |= zip(waiting, answered, strict=True)
        return [answers[place] for place in range(len(updates))]

    def _write_verdict(
        self, update: points_pb2.PointsUpdate, verdict: ApplyResult, at_ms: int
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Write the answer to one update; a duplicate that another webhook brought is counted, and logged by its ids.

        Source: ledger.md, identity: the known limit of truly identical events.
        """
        if verdict.entry_webhook_id:
            self._metrics.duplicates_with_other_webhook_id.inc()
            log.info(
                "duplicate under another webhook id",
                merchant_id=update.merchant_id,
                store_id=update.store_id,
                event_id=verdict.entry.event.event_id,
                webhook_id=update.webhook.webhook_id,
                entry_webhook_id=verdict.entry_webhook_id,
            )
        account = AccountKey(update.store_id, update.buyer_id)
        return points_pb2.ApplyPointsUpdateResponse(
            outcome=OUTCOMES[verdict.outcome],
            account=_write_account(update.merchant_id, account, verdict.account, at_ms),
            drift=verdict.entry.drift,
            webhook_id_differs=bool(verdict.entry_webhook_id),
        )

    def _write_error(self, error: BaseException) -> points_pb2.UpdateError:
        """Write the error of one update; what is a defect of ours is logged, and told as such."""
        if not isinstance(error, PointbookError):
            log.error("internal error", exc_info=error)
            error = PointbookError(Reason.INTERNAL, "Something broke on our side; the log has the cause.")
        error = current_principal.get().visible_error(error)
        number: int = self._grpc_code(error.reason).value[0]
        return points_pb2.UpdateError(
            code=number,
            reason=error.reason.value,
            message=error.message,
            violations=[
                points_pb2.FieldViolation(field=violation.field, description=violation.description)
                for violation in error.violations[:VIOLATIONS_MAX]
            ],
            metadata=error.metadata,
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
        account = await self._store.account(request.merchant_id, key, at_ms, lots=LOTS_MAX)
        expiry = await self._store.next_expiry(request.merchant_id, key, account, at_ms)
        message = _write_account(request.merchant_id, key, account, at_ms)
        for lot in account.lots[:LOTS_MAX]:
            message.lots.add(
                remaining_points=lot.remaining,
                original_points=lot.original,
                points_expiry_time=_optional_timestamp(lot.expires_at_ms),
                event_id=lot.event_id,
            )
        message.lots_truncated = len(account.lots) > LOTS_MAX or account.far_lots is not None
        if expiry is not None:
            message.next_expiry.points = expiry.points
            message.next_expiry.time.CopyFrom(to_timestamp(expiry.at_ms))
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
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (int, str))
        fields.check()
        before = None if place is None else (int(place[0]), str(place[1]))
        found = await self._store.entries(request.merchant_id, key, wanted, before=before, limit=size + 1)
        page = pagination.fit((_write_entry(request.merchant_id, entry) for entry in found), size)
        response = points_pb2.ListPointsEntriesResponse(entries=page)
        if len(found) > len(page):
            last = found[len(page) - 1].entry
            response.next_page_token = pagination.write_token(scope, (last.event.updated_at_ms, last.event.event_id))
        return response

    async def ListDriftingAccounts(
        self,
        request: points_pb2.ListDriftingAccountsRequest,
        _context: object,
    ) -> points_pb2.ListDriftingAccountsResponse:
        """Answer a page of the accounts whose drift is not zero."""
        now_ms = self._clock()
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX)
        size = fields.page_size("page_size", request.page_size)
        scope = ("drifting", merchant_id, store_id)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (str, str))
        fields.check()
        after = AccountKey("", "") if place is None else AccountKey(str(place[0]), str(place[1]))
        found = await self._store.drifting_accounts(merchant_id, store_id, now_ms, after=after, limit=size + 1)
        response = points_pb2.ListDriftingAccountsResponse(
            accounts=[_write_account(merchant_id, key, account, now_ms) for key, account in found[:size]]
        )
        if len(found) > size:
            last = found[size - 1][0]
            response.next_page_token = pagination.write_token(scope, (last.store_id, last.buyer_id))
        return response

    async def ListExpiringPoints(
        self,
        request: points_pb2.ListExpiringPointsRequest,
        _context: object,
    ) -> points_pb2.ListExpiringPointsResponse:
        """Return a page of the points that expire in a window of time."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        _check_stores(fields, request)
        size = fields.page_size("page_size", request.page_size)
        times = (request.HasField("from_time"), str(request.from_time), str(request.until_time))
        scope = ("expiring", merchant_id, request.store_id, request.program_id, times)
        token = pagination.read_token(fields, "page_token", request.page_token, scope, (int, int, str, str))
        now_ms, after = _read_place(token) or (self._clock(), None)
        start_ms, end_ms = _read_window(fields, request, now_ms, after)
        fields.check()
        window = ExpiryWindow(await self._store_ids(request), start_ms, end_ms, now_ms)
        page = await self._store.expiring(merchant_id, window, after=after, size=size)
        response = points_pb2.ListExpiringPointsResponse()
        for place, points in page.items:
            response.items.add(
                store_id=place.store_id, buyer_id=place.buyer_id, time=to_timestamp(place.at_ms), points=points
            )
        if page.end is not None:
            response.next_page_token = pagination.write_token(scope, (now_ms, *page.end))
        return response

    async def _store_ids(self, request: points_pb2.ListExpiringPointsRequest) -> tuple[str, ...]:
        """Return the stores that a request names. Raises STORE_NOT_FOUND and PROGRAM_NOT_FOUND."""
        if request.HasField("store_id"):
            await self._programs.read_store(request.merchant_id, request.store_id)
            return (request.store_id,)
        found = await self._programs.read_program(request.merchant_id, request.program_id)
        if found is None:
            raise program_not_found(request.program_id)
        program, _ = found
        return program.store_ids

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: pagination.PageQuery
    ) -> list[points_pb2.PointsEntry]:
        """Return a page of the entries of some accounts, the newest first, for a customer's timeline."""
        found = await self._store.newest_entries(merchant_id, keys, query)
        return [_write_entry(merchant_id, entry) for entry in found]

    async def VoidPointsEntries(
        self,
        request: points_pb2.VoidPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.VoidPointsEntriesResponse:
        """Let entries count for nothing."""
        return points_pb2.VoidPointsEntriesResponse(accounts=await self._set_void(request, is_void=True))

    async def UnvoidPointsEntries(
        self,
        request: points_pb2.UnvoidPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.UnvoidPointsEntriesResponse:
        """Let void entries count again."""
        return points_pb2.UnvoidPointsEntriesResponse(accounts=await self._set_void(request, is_void=False))

    async def _set_void(
        self, request: points_pb2.VoidPointsEntriesRequest | points_pb2.UnvoidPointsEntriesRequest, *, is_void: bool
    ) -> list[points_pb2.PointsAccount]:
        now_ms = self._clock()
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        event_ids = fields.each(
            "event_ids",
            request.event_ids,
            lambda path, event_id: fields.identifier(path, event_id, length_max=EVENT_ID_LENGTH_MAX),
            count_min=1,
            count_max=UPDATES_MAX,
        )
        fields.present("reason", is_present=bool(request.reason))
        reason = fields.text("reason", request.reason, length_max=REASON_LENGTH_MAX)
        fields.check()
        accounts = await self._store.set_void(merchant_id, event_ids, Void(now_ms, reason), is_void=is_void)
        return [_write_account(merchant_id, key, account, now_ms) for key, account in sorted(accounts.items())]


def _read_update(update: points_pb2.PointsUpdate, now_ms: int) -> tuple[str, ReceivedEvent] | PointbookError:
    """Read one of many updates, or tell what is wrong with it."""
    fields = Fields()
    received = _read_received(fields, update, now_ms)
    try:
        fields.check()
    except PointbookError as error:
        return error
    return update.merchant_id, received


def _read_received(fields: Fields, update: points_pb2.PointsUpdate, now_ms: int) -> ReceivedEvent:
    event = read_event(fields, "update", update, now_ms)
    webhook = _read_webhook(fields, "update.webhook", update.webhook)
    return ReceivedEvent(event, webhook, now_ms, update.forget_refusal)


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
        # SHOPLINE calls the expiry irrelevant unless points increase.
        is_relevant = update_type is UpdateType.INCREASE
        low = YEAR_2000_MS if is_relevant else TIME_MS_MIN
        read_ms = fields.time_ms(f"{path}.points_expiry_time", update.points_expiry_time, low=low)
        expires_at_ms = read_ms if is_relevant else None
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
        expires_at_ms=expires_at_ms,
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


def _read_webhook(fields: Fields, path: str, webhook: points_pb2.WebhookMetadata) -> WebhookOrigin:
    return WebhookOrigin(
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


def _check_stores(fields: Fields, request: points_pb2.ListExpiringPointsRequest) -> None:
    if not fields.present("store_id", is_present=request.WhichOneof("stores") is not None):
        return
    if request.HasField("store_id"):
        fields.identifier("store_id", request.store_id)
    else:
        fields.integer("program_id", request.program_id, low=1, high=pagination.INTEGER_MAX)


def _read_place(token: Sequence[int | str] | None) -> tuple[int, Place] | None:
    """Read a page token of expiring points: the moment of the first page, and the place behind which to go on."""
    if token is None:
        return None
    now_ms, at_ms, store_id, buyer_id = token
    return int(now_ms), Place(int(at_ms), str(store_id), str(buyer_id))


def _read_window(
    fields: Fields, request: points_pb2.ListExpiringPointsRequest, now_ms: int, after: Place | None
) -> tuple[int, int]:
    """Read from when on and before when points expire; what expires at this very moment has expired already."""
    start_ms = now_ms + 1
    if request.HasField("from_time"):
        start_ms = fields.time_ms("from_time", request.from_time)
    end_ms = start_ms + 1
    if fields.present("until_time", is_present=request.HasField("until_time")):
        end_ms = fields.time_ms("until_time", request.until_time)
    if after is not None and not start_ms <= after.at_ms < end_ms:
        fields.wrong("page_token", "must be a next_page_token that was answered for the same request")
    elif end_ms <= start_ms:
        fields.wrong("until_time", "must be after from_time, or after now where from_time is absent")
    return start_ms, end_ms


def _write_account(merchant_id: str, key: AccountKey, account: Account, at_ms: int) -> points_pb2.PointsAccount:
    """Write an account as of a moment, without its lots."""
    points = account.points_at(at_ms)
    return points_pb2.PointsAccount(
        merchant_id=merchant_id,
        store_id=key.store_id,
        buyer_id=key.buyer_id,
        points_balance=account.balance,
        active_points=points.active,
        held_points=points.held,
        expired_points=points.expired,
        drift=account.drift,
        silently_expired_points=account.silently_expired,
        lifetime_points=account.lifetime_points,
        as_of=to_timestamp(at_ms),
    )


def _write_entry(merchant_id: str, received: StoredEntry) -> points_pb2.PointsEntry:
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
    if webhook != WebhookOrigin():
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
            for draw in entry.draws[:DRAWS_MAX]
        ],
        draws_truncated=len(entry.draws) > DRAWS_MAX,
        void=None
        if received.void is None
        else points_pb2.EntryVoid(reason=received.void.reason, time=to_timestamp(received.void.at_ms)),
        settled_redemption_id=received.settled_redemption_id or "",
    )


def _update_type_number(update_type: UpdateType) -> points_pb2.PointsUpdateType.ValueType:
    if update_type is UpdateType.INCREASE:
        return points_pb2.POINTS_UPDATE_TYPE_INCREASE
    return points_pb2.POINTS_UPDATE_TYPE_DECREASE


def _optional_timestamp(time_ms: int | None) -> Timestamp | None:
    return None if time_ms is None else to_timestamp(time_ms)
