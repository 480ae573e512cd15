"""The gRPC face of the ledger."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import grpc
import structlog

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.ledger import messages
from pointbook_server.ledger.expiring_points import ExpiryWindow
from pointbook_server.ledger.model import AccountKey, ApplyOutcome, ApplyResult, ReceivedEvent, Void
from pointbook_server.ledger.transactions import LedgerTransactions
from pointbook_server.metrics import EventMetrics, Metrics
from pointbook_server.programs.model import Program, Store, program_not_found
from pointbook_server.reasons import Reason
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.pagination import PageQuery, read_page, write_token
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, Fields, to_timestamp

VIOLATIONS_MAX = 50
"""The most field violations that the error of one update in a batch reports."""

REFUSED = ApplyOutcome.REFUSED.value
FAILED = "FAILED"
"""The outcome of updates that can be sent again, in metrics."""

log = structlog.get_logger()


class Programs(Protocol):
    """The part of programs that the ledger reads."""

    async def read_store(self, merchant_id: str, store_id: str) -> tuple[Store, int]:
        """Read one store and its revision. Raises STORE_NOT_FOUND."""

    async def read_program(self, merchant_id: str, program_id: int) -> tuple[Program, int] | None:
        """Read one program and its revision."""


class WebhookTimes(Protocol):
    """Remembers when webhooks were accepted."""

    def note(self, merchant_id: str, store_id: str, at_ms: int) -> None:
        """Remember that a webhook of a store was accepted at a time."""


class PointsServicer(points_pb2_grpc.PointsServiceServicer):
    """The methods of PointsService.

    Concurrent updates share a transaction through the batcher. `grpc_code` maps the reason of an error to a code.
    """

    def __init__(
        self,
        ledger: LedgerTransactions,
        programs: Programs,
        batcher: Batcher[str, ReceivedEvent, ApplyResult],
        clock: Clock,
        *,
        grpc_code: Callable[[Reason], grpc.StatusCode],
        metrics: Metrics,
        events: EventMetrics,
        webhook_times: WebhookTimes,
    ) -> None:
        self._ledger = ledger
        self._programs = programs
        self._batcher = batcher
        self._clock = clock
        self._grpc_code = grpc_code
        self._metrics = metrics
        self._events = events
        self._webhook_times = webhook_times

    async def ApplyPointsUpdate(
        self,
        request: points_pb2.ApplyPointsUpdateRequest,
        _context: object,
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Apply one event."""
        now_ms = self._clock()
        update = request.update
        try:
            received = messages.read_update(update, now_ms, is_present=request.HasField("update"))
            self._batcher.check_capacity(1)
            result = await self._batcher.run(update.merchant_id, received)
        except PointbookError as error:
            self._count_error(update, error)
            raise
        response = self._update_response(update, result, now_ms)
        messages.fill_account_of(response, update, result, now_ms)
        return response

    async def BatchApplyPointsUpdates(
        self,
        request: points_pb2.BatchApplyPointsUpdatesRequest,
        _context: object,
    ) -> points_pb2.BatchApplyPointsUpdatesResponse:
        """Apply events, and return a result or an error for each."""
        now_ms = self._clock()
        fields = Fields()
        if not 1 <= len(request.updates) <= messages.UPDATES_MAX:
            fields.wrong("updates", f"must have 1 to {messages.UPDATES_MAX:,} items")
        fields.check()
        results = await self._apply_all(request.updates, now_ms)
        response = points_pb2.BatchApplyPointsUpdatesResponse()
        for update, result in zip(request.updates, results, strict=True):
            if isinstance(result, ApplyResult):
                applied = response.results.add(response=self._update_response(update, result, now_ms)).response
                if not request.outcomes_only:
                    messages.fill_account_of(applied, update, result, now_ms)
            else:
                response.results.add(error=self._update_error(update, result))
        return response

    async def _apply_all(
        self, updates: Sequence[points_pb2.PointsUpdate], now_ms: int
    ) -> list[ApplyResult | BaseException]:
        """Submit the valid updates by merchant, and return all results in order."""
        results: dict[int, ApplyResult | BaseException] = {}
        batches: defaultdict[str, dict[int, ReceivedEvent]] = defaultdict(dict)
        for index, update in enumerate(updates):
            try:
                batches[update.merchant_id][index] = messages.read_update(update, now_ms)
            except PointbookError as error:
                results[index] = error
        self._batcher.check_capacity(sum(map(len, batches.values())))
        futures: dict[int, asyncio.Future[ApplyResult | PointbookError]] = {}
        for merchant_id, batch in batches.items():
            futures |= zip(batch, self._batcher.submit(merchant_id, list(batch.values())), strict=True)
        applied = await asyncio.gather(*futures.values(), return_exceptions=True)
        results |= zip(futures, applied, strict=True)
        return [results[index] for index in range(len(updates))]

    def _update_response(
        self, update: points_pb2.PointsUpdate, result: ApplyResult, now_ms: int
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Build the response to an update, without the account.

        A duplicate that another webhook delivered is counted and logged.
        Source: docs/reference/ledger.md#indistinguishable-events.
        """
        if update.webhook.webhook_id:
            self._webhook_times.note(update.merchant_id, update.store_id, now_ms)
        if result.entry_webhook_id:
            self._metrics.duplicates_with_other_webhook_id.inc()
            log.info(
                "duplicate under another webhook id",
                merchant_id=update.merchant_id,
                store_id=update.store_id,
                event_id=result.entry.event.event_id,
                webhook_id=update.webhook.webhook_id,
                entry_webhook_id=result.entry_webhook_id,
            )
        return points_pb2.ApplyPointsUpdateResponse(
            outcome=messages.OUTCOMES[result.outcome],
            drift=result.entry.drift,
            webhook_id_differs=bool(result.entry_webhook_id),
        )

    def _count_error(self, update: points_pb2.PointsUpdate, error: PointbookError) -> None:
        """Count an update that was not applied, by whether that is final."""
        scene = messages.SCENE_NAMES.get(update.updated_scene, "")
        self._events.count(scene, REFUSED if error.retry_after_seconds is None else FAILED)

    def _update_error(self, update: points_pb2.PointsUpdate, error: BaseException) -> points_pb2.UpdateError:
        """Count an update, and build the error of it.

        A defect is logged, and reported as INTERNAL.
        """
        if not isinstance(error, PointbookError):
            log.error("internal error", exc_info=error)
            error = PointbookError(Reason.INTERNAL, "An internal error occurred; the server's log has the cause.")
        self._count_error(update, error)
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
        """Return an account, with its lots unless the request excludes them."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        key = messages.read_account_key(fields, request)
        at_ms = fields.time_ms("at_time", request.at_time) if request.HasField("at_time") else self._clock()
        fields.check()
        with_lots = request.with_lots or not request.HasField("with_lots")
        account = await self._ledger.account(merchant_id, key, at_ms, lots=messages.LOTS_MAX if with_lots else 0)
        next_expiry = await self._ledger.next_expiry(merchant_id, key, account, at_ms)
        message = messages.write_account_with_expiry(merchant_id, key, account, next_expiry, at_ms, with_lots=with_lots)
        return points_pb2.GetPointsAccountResponse(account=message)

    async def ListPointsEntries(
        self,
        request: points_pb2.ListPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.ListPointsEntriesResponse:
        """Return a page of an account's entries."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        key = messages.read_account_key(fields, request)
        entry_filter = messages.read_entry_filter(fields, request)
        scope = (merchant_id, key.store_id, key.buyer_id, entry_filter)
        page = read_page(fields, request, scope, first=messages.NEWEST_POSITION)
        fields.check()
        before = None if page.after == messages.NEWEST_POSITION else page.after
        found = await self._ledger.entries(merchant_id, key, entry_filter, before=before, limit=page.limit)
        entries, next_page_token = page.build(
            found,
            partial(messages.write_entry, merchant_id),
            lambda stored: (stored.entry.event.updated_at_ms, stored.entry.event.event_id),
        )
        return points_pb2.ListPointsEntriesResponse(entries=entries, next_page_token=next_page_token)

    async def ListDriftingAccounts(
        self,
        request: points_pb2.ListDriftingAccountsRequest,
        _context: object,
    ) -> points_pb2.ListDriftingAccountsResponse:
        """Return a page of the accounts whose drift is not zero."""
        now_ms = self._clock()
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX)
        page = read_page(fields, request, ("drifting", merchant_id, store_id), first=("", ""))
        fields.check()
        after = AccountKey(*page.after)
        found = await self._ledger.drifting_accounts(merchant_id, store_id, now_ms, after=after, limit=page.limit)
        accounts, next_page_token = page.build(
            found,
            lambda item: messages.write_account(merchant_id, *item, now_ms),
            lambda item: item[0],
        )
        return points_pb2.ListDriftingAccountsResponse(accounts=accounts, next_page_token=next_page_token)

    async def ListExpiringPoints(
        self,
        request: points_pb2.ListExpiringPointsRequest,
        _context: object,
    ) -> points_pb2.ListExpiringPointsResponse:
        """Return a page of the points that expire in a window of time."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        messages.check_stores(fields, request)
        times = (request.HasField("from_time"), str(request.from_time), str(request.until_time))
        scope = ("expiring", merchant_id, request.store_id, request.program_id, times)
        page = read_page(fields, request, scope, first=messages.first_expiring_position(self._clock()))
        now_ms, after = messages.read_expiring_position(page.after)
        start_ms, end_ms = messages.read_expiry_times(fields, request, now_ms, after)
        fields.check()
        window = ExpiryWindow(await self._find_store_ids(request), start_ms, end_ms, now_ms)
        found = await self._ledger.expiring_points(merchant_id, window, after=after, size=page.size)
        response = points_pb2.ListExpiringPointsResponse()
        for position, points in found.items:
            time = to_timestamp(position.at_ms)
            response.items.add(store_id=position.store_id, buyer_id=position.buyer_id, time=time, points=points)
        if found.end is not None:
            response.next_page_token = write_token(scope, (now_ms, *found.end))
        return response

    async def _find_store_ids(self, request: points_pb2.ListExpiringPointsRequest) -> tuple[str, ...]:
        """Return the stores of a request. Raises STORE_NOT_FOUND and PROGRAM_NOT_FOUND."""
        if request.HasField("store_id"):
            await self._programs.read_store(request.merchant_id, request.store_id)
            return (request.store_id,)
        found = await self._programs.read_program(request.merchant_id, request.program_id)
        if found is None:
            raise program_not_found(request.program_id)
        program, _ = found
        return program.store_ids

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: PageQuery
    ) -> list[points_pb2.PointsEntry]:
        """Return a page of the entries of some accounts, newest first.

        The timeline of a customer contains them.
        """
        found = await self._ledger.newest_entries(merchant_id, keys, query)
        return [messages.write_entry(merchant_id, stored) for stored in found]

    async def VoidPointsEntries(
        self,
        request: points_pb2.VoidPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.VoidPointsEntriesResponse:
        """Void entries."""
        return points_pb2.VoidPointsEntriesResponse(accounts=await self._set_void(request, is_void=True))

    async def UnvoidPointsEntries(
        self,
        request: points_pb2.UnvoidPointsEntriesRequest,
        _context: object,
    ) -> points_pb2.UnvoidPointsEntriesResponse:
        """Undo the voiding of entries."""
        return points_pb2.UnvoidPointsEntriesResponse(accounts=await self._set_void(request, is_void=False))

    async def _set_void(
        self, request: points_pb2.VoidPointsEntriesRequest | points_pb2.UnvoidPointsEntriesRequest, *, is_void: bool
    ) -> list[points_pb2.PointsAccount]:
        now_ms = self._clock()
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        event_ids = messages.read_event_ids(fields, request)
        reason = fields.reason("reason", request.reason, may_be_blank=True)
        fields.check()
        accounts = await self._ledger.set_void(merchant_id, event_ids, Void(now_ms, reason), is_void=is_void)
        return [messages.write_account(merchant_id, key, account, now_ms) for key, account in sorted(accounts.items())]
