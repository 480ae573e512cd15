"""The gRPC methods of support: refused calls and the customer timeline.

They are methods of RedemptionService, whose servicer delegates them to this one.
"""

from typing import Protocol

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import CustomerKey
from pointbook_server.redemption.assessment import RedemptionContext
from pointbook_server.redemption.history_requests import read_history_page, read_window
from pointbook_server.redemption.messages import REFERENCE_LENGTH_MAX, read_customer_key
from pointbook_server.rpc.pagination import read_page
from pointbook_server.rpc.request_fields import Fields
from pointbook_server.support.messages import write_refusal, write_timeline_customer
from pointbook_server.support.model import EntryRank, TimelinePosition
from pointbook_server.support.recorder import RefusalRecorder
from pointbook_server.support.timeline import Timeline


class Customers(Protocol):
    """The part of redemption that finds customers."""

    async def find_customer(self, merchant_id: str, key: CustomerKey | None) -> RedemptionContext:
        """Return a customer's context. Raises IDENTIFIER_INVALID, CUSTOMER_NOT_FOUND."""


class SupportServicer:
    """The methods of support."""

    def __init__(self, customers: Customers, refusals: RefusalRecorder, timeline: Timeline) -> None:
        self._customers = customers
        self._refusals = refusals
        self._timeline = timeline

    async def ListRefusals(
        self, request: redemption_pb2.ListRefusalsRequest, _context: object
    ) -> redemption_pb2.ListRefusalsResponse:
        """Return a page of the refused calls of a customer or a reference."""
        fields = Fields()
        reference = fields.ascii(
            "external_reference_number", request.external_reference_number, length_max=REFERENCE_LENGTH_MAX
        )
        has_key = request.WhichOneof("key") is not None
        key = read_customer_key(fields, request) if has_key or not reference else None
        page, query = read_history_page(fields, "refusals", request, key, reference)
        fields.check()
        merchant_id = request.merchant_id
        if has_key:
            names = (await self._customers.find_customer(merchant_id, key)).redeemers
            refusals = await self._refusals.list_by_customers(merchant_id, names, reference, query)
        else:
            refusals = await self._refusals.list_by_reference(merchant_id, reference, query)
        messages, next_page_token = page.build(
            refusals, write_refusal, lambda refusal: (refusal.at_ms, refusal.refusal_id)
        )
        return redemption_pb2.ListRefusalsResponse(refusals=messages, next_page_token=next_page_token)

    async def ListCustomerTimeline(
        self, request: redemption_pb2.ListCustomerTimelineRequest, _context: object
    ) -> redemption_pb2.ListCustomerTimelineResponse:
        """Return a page of a customer's timeline, the newest first."""
        fields = Fields()
        key = read_customer_key(fields, request)
        window = read_window(fields, "timeline", request, key)
        page = read_page(fields, request, window.scope, first=(window.end_ms, EntryRank.FIRST_PAGE.value, ""))
        fields.check()
        context = await self._customers.find_customer(request.merchant_id, key)
        items = await self._timeline.page(
            request.merchant_id,
            context,
            start_ms=window.start_ms,
            before=TimelinePosition(*page.after),
            limit=page.limit,
        )
        entries, next_page_token = page.build(items, lambda item: item.entry, lambda item: item.position)
        return redemption_pb2.ListCustomerTimelineResponse(
            customer=write_timeline_customer(context), entries=entries, next_page_token=next_page_token
        )
