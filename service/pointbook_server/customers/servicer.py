"""The gRPC face of customers and user groups."""

from typing import Protocol

import structlog

from pointbook.v1 import customers_pb2, customers_pb2_grpc
from pointbook_server.clock import Clock
from pointbook_server.customers.group_transactions import UserGroupTransactions
from pointbook_server.customers.messages import (
    KeyPaths,
    keys_taken,
    read_customer,
    read_customer_key,
    read_group,
    read_move,
    read_update,
    write_applied,
    write_customer,
    write_group,
)
from pointbook_server.customers.model import (
    CannotReceiveError,
    GroupKey,
    KeysTakenError,
    UpdateKind,
    UpdateOutcome,
    customer_not_found,
    group_not_found,
)
from pointbook_server.customers.transactions import REDACT_WEBHOOK, CustomerTransactions
from pointbook_server.rpc.request_fields import Fields, read_etag, to_timestamp

log = structlog.get_logger()


class WebhookTimes(Protocol):
    """Remembers when webhooks were accepted."""

    def note(self, merchant_id: str, store_id: str, at_ms: int) -> None:
        """Remember that a webhook of a store was accepted at a time."""


class CustomersServicer(customers_pb2_grpc.CustomersServiceServicer):
    """CustomersService: customers, their identifiers and webhooks, and user groups."""

    def __init__(
        self,
        customers: CustomerTransactions,
        groups: UserGroupTransactions,
        clock: Clock,
        *,
        webhook_times: WebhookTimes,
    ) -> None:
        self._customers = customers
        self._groups = groups
        self._webhook_times = webhook_times
        self._clock = clock

    async def PutCustomer(
        self, request: customers_pb2.PutCustomerRequest, _context: object
    ) -> customers_pb2.PutCustomerResponse:
        """Create or replace a customer."""
        fields = Fields()
        fields.present("customer", is_present=request.HasField("customer"))
        paths: KeyPaths = {}
        customer = read_customer(fields, request.customer, paths)
        fields.check()
        try:
            stored = await self._customers.put(customer, read_etag(request.etag), self._clock())
        except KeysTakenError as error:
            raise keys_taken(error, paths) from None
        return customers_pb2.PutCustomerResponse(customer=write_customer(stored), etag=str(stored.revision))

    async def GetCustomer(
        self, request: customers_pb2.GetCustomerRequest, _context: object
    ) -> customers_pb2.GetCustomerResponse:
        """Return a customer."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        key = read_customer_key(fields, request)
        fields.check()
        customer = None if key is None else await self._customers.find(request.merchant_id, key)
        if customer is None:
            raise customer_not_found("")
        return customers_pb2.GetCustomerResponse(customer=write_customer(customer), etag=str(customer.revision))

    async def ApplyCustomerUpdate(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, _context: object
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply a customer webhook."""
        return await self._apply(request, is_decided=False)

    async def apply_decided(
        self, request: customers_pb2.ApplyCustomerUpdateRequest
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply a customer webhook that an operator has decided for.

        The decision is against an update of another kind and the same time.
        """
        return await self._apply(request, is_decided=True)

    async def _apply(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, *, is_decided: bool
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        now_ms = self._clock()
        update = read_update(request, now_ms, is_decided=is_decided)
        applied = await self._customers.apply(update, now_ms)
        self._webhook_times.note(update.merchant_id, update.buyer.store_id, now_ms)
        bound_log = log.bind(merchant_id=update.merchant_id, customer_id=applied.customer_id)
        for kind, cause in applied.skipped.items():
            bound_log.info("identifier of a customer webhook left out", identifier=kind.value, cause=cause.value)
        if update.kind is UpdateKind.REDACTED and applied.outcome is UpdateOutcome.APPLIED:
            bound_log.warning("audit: customer redacted", reason=REDACT_WEBHOOK)
        return write_applied(applied)

    async def MoveIdentifier(
        self, request: customers_pb2.MoveIdentifierRequest, _context: object
    ) -> customers_pb2.MoveIdentifierResponse:
        """Move an identifier to another customer, and audit it."""
        move = read_move(request)
        try:
            from_revision, to_revision = await self._customers.move(
                request.merchant_id, move.key, move.giver_id, move.receiver_id, reason=move.reason, now_ms=self._clock()
            )
        except KeysTakenError as error:
            raise keys_taken(error, {move.key: move.path}) from None
        except CannotReceiveError as error:
            fields = Fields()
            fields.wrong(move.path, str(error))
            fields.check()
            raise
        log.warning(
            "audit: identifier moved",
            merchant_id=request.merchant_id,
            customer_id=move.giver_id,
            to_customer_id=move.receiver_id,
            reason=move.reason,
        )
        return customers_pb2.MoveIdentifierResponse(from_etag=str(from_revision), to_etag=str(to_revision))

    async def RedactCustomer(
        self, request: customers_pb2.RedactCustomerRequest, _context: object
    ) -> customers_pb2.RedactCustomerResponse:
        """Erase a customer's personal data, and audit it."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        customer_id = fields.identifier("customer_id", request.customer_id)
        reason = fields.reason("reason", request.reason)
        fields.check()
        redacted_at_ms = await self._customers.redact(request.merchant_id, customer_id, reason, self._clock())
        log.warning("audit: customer redacted", merchant_id=request.merchant_id, customer_id=customer_id, reason=reason)
        return customers_pb2.RedactCustomerResponse(redact_time=to_timestamp(redacted_at_ms))

    async def PutUserGroup(
        self, request: customers_pb2.PutUserGroupRequest, _context: object
    ) -> customers_pb2.PutUserGroupResponse:
        """Create or replace a user group."""
        fields = Fields()
        fields.present("user_group", is_present=request.HasField("user_group"))
        group = read_group(fields, request.user_group)
        fields.check()
        stored = await self._groups.put(group, read_etag(request.etag), self._clock())
        return customers_pb2.PutUserGroupResponse(user_group=write_group(stored), etag=str(stored.revision))

    async def GetUserGroup(
        self, request: customers_pb2.GetUserGroupRequest, _context: object
    ) -> customers_pb2.GetUserGroupResponse:
        """Return a user group."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        group_id = fields.identifier("group_id", request.group_id)
        fields.check()
        group = await self._customers.find_group(request.merchant_id, GroupKey.ID, group_id)
        if group is None:
            raise group_not_found(group_id)
        return customers_pb2.GetUserGroupResponse(user_group=write_group(group), etag=str(group.revision))

    async def DeleteUserGroup(
        self, request: customers_pb2.DeleteUserGroupRequest, _context: object
    ) -> customers_pb2.DeleteUserGroupResponse:
        """Delete a user group."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        group_id = fields.identifier("group_id", request.group_id)
        fields.check()
        await self._groups.delete(request.merchant_id, group_id, read_etag(request.etag))
        return customers_pb2.DeleteUserGroupResponse()
