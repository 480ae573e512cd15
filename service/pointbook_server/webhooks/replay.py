"""Replay of webhooks in quarantine by an operator's update.

The services that apply updates accept messages, so that a replay is checked like any other call.
"""

from typing import Protocol

import structlog

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2, webhooks_pb2
from pointbook_common.shopline_webhooks import CUSTOMER_UPDATE_KINDS, POINTS_TOPIC, STORE_ERASURE_TOPIC
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.request_fields import EVENT_ID_LENGTH_MAX, Fields, to_timestamp
from pointbook_server.webhooks.messages import read_key, read_visibility
from pointbook_server.webhooks.model import NO_TOPIC, ReplayClaim
from pointbook_server.webhooks.transactions import QuarantineTransactions

CUSTOMER_UPDATE_KIND_NUMBERS = {
    topic: customers_pb2.CustomerUpdateKind.Value(f"CUSTOMER_UPDATE_KIND_{kind}")
    for topic, kind in CUSTOMER_UPDATE_KINDS.items()
}

log = structlog.get_logger()


class PointsService(Protocol):
    """The methods of PointsService that replays call."""

    async def ApplyPointsUpdate(
        self, request: points_pb2.ApplyPointsUpdateRequest, _context: object, /
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Apply one points event."""


class CustomersService(Protocol):
    """The methods of CustomersService that replays call."""

    async def ApplyCustomerUpdate(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, _context: object, /
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply one customer webhook."""

    async def apply_decided(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, /
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply one customer webhook, despite a contradiction, as an operator decided."""


class ProgramsService(Protocol):
    """The methods of ProgramsService that replays call."""

    async def RequestStoreErasure(
        self, request: programs_pb2.RequestStoreErasureRequest, _context: object, /
    ) -> programs_pb2.RequestStoreErasureResponse:
        """Store a request to erase a store."""


class Replayer:
    """Applies the updates of webhooks in quarantine, each at most once.

    `duration_max_ms` is the longest time that a replay takes to apply its update.
    """

    def __init__(
        self,
        quarantine: QuarantineTransactions,
        points: PointsService,
        customers: CustomersService,
        programs: ProgramsService,
        clock: Clock,
        *,
        duration_max_ms: int,
    ) -> None:
        self._quarantine = quarantine
        self._points = points
        self._customers = customers
        self._programs = programs
        self._clock = clock
        self._duration_max_ms = duration_max_ms

    async def replay(
        self, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Claim a webhook, apply its update, and mark it as replayed."""
        merchant_id, quarantine_id, event_id = _read_request(request)
        now_ms = self._clock()
        claim = await self._quarantine.claim(
            read_visibility(merchant_id), quarantine_id, event_id, now_ms, now_ms + self._duration_max_ms
        )
        try:
            response = await self._apply(claim, request, context)
        except PointbookError as error:
            # If the database went away, the event may have been applied.
            if error.reason is not Reason.DATABASE_UNAVAILABLE:
                await self._quarantine.release(claim)
            raise
        if request.overrides_contradiction:
            log.warning(
                "audit: contradiction of customer webhook overridden",
                merchant_id=merchant_id,
                quarantine_id=quarantine_id,
            )
        response.replay_time.CopyFrom(to_timestamp(await self._quarantine.mark_replayed(claim, self._clock())))
        return response

    async def _apply(
        self, claim: ReplayClaim, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Apply the update of a claimed webhook.

        Violations name the fields by their paths in this request.
        """
        fields = Fields()
        kind = request.WhichOneof("update")
        if claim.topic != NO_TOPIC:
            _check_kind(fields, claim.topic, request)
        fields.check()
        try:
            return await self._apply_update(request, context)
        except PointbookError as error:
            # ApplyPointsUpdateRequest has the update in a field `update`, the others are the update itself.
            prefix = "points_" if kind == "points_update" else f"{kind}."
            for violation in error.violations:
                fields.wrong(f"{prefix}{violation.field}", violation.description)
            fields.check()
            raise

    async def _apply_update(
        self, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Call the service of the update's kind."""
        kind = request.WhichOneof("update")
        if kind == "points_update":
            points = points_pb2.ApplyPointsUpdateRequest(update=request.points_update)
            return webhooks_pb2.ReplayQuarantinedWebhookResponse(
                points_update=await self._points.ApplyPointsUpdate(points, context)
            )
        if kind == "store_erasure":
            return webhooks_pb2.ReplayQuarantinedWebhookResponse(
                store_erasure=await self._programs.RequestStoreErasure(request.store_erasure, context)
            )
        update = request.customer_update
        if request.overrides_contradiction:
            applied = await self._customers.apply_decided(update)
        else:
            applied = await self._customers.ApplyCustomerUpdate(update, context)
        return webhooks_pb2.ReplayQuarantinedWebhookResponse(customer_update=applied)


def _read_request(request: webhooks_pb2.ReplayQuarantinedWebhookRequest) -> tuple[str, str, str]:
    """Return the ids of merchant, webhook and event. Raises INVALID_FIELDS."""
    fields = Fields()
    merchant_id, quarantine_id = read_key(fields, request)
    kind = request.WhichOneof("update")
    fields.present("points_update", is_present=kind is not None)
    if request.overrides_contradiction and kind != "customer_update":
        fields.wrong("overrides_contradiction", "must be false unless there is a customer_update")
    event_id = getattr(request, kind).event_id if kind else ""
    if kind:
        fields.identifier(f"{kind}.event_id", event_id, length_max=EVENT_ID_LENGTH_MAX)
    fields.check()
    return merchant_id, quarantine_id, event_id


def _check_kind(fields: Fields, topic: str, request: webhooks_pb2.ReplayQuarantinedWebhookRequest) -> None:
    """Add a violation if the update is not of the kind that the topic requires."""
    kind = request.WhichOneof("update")
    if kind == "points_update" and topic != POINTS_TOPIC:
        fields.wrong(kind, "must be the update of a points webhook, which this one is not")
    if kind == "customer_update" and CUSTOMER_UPDATE_KIND_NUMBERS.get(topic) != request.customer_update.kind:
        fields.wrong("customer_update.kind", "must be the kind of the webhook's topic")
    if kind == "store_erasure" and topic != STORE_ERASURE_TOPIC:
        fields.wrong(kind, "must be the request of a webhook to erase a store, which this one is not")
