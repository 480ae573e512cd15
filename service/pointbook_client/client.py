"""The client for asyncio.

The examples run against a server: `address` and `token` are its own, and `customer` has 100 points in program 1.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Generic, Self, TypeVar, Unpack

from pointbook.v1 import (
    access_pb2_grpc,
    benefits_pb2_grpc,
    customers_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    programs_pb2_grpc,
    redemption_pb2_grpc,
    webhooks_pb2_grpc,
)
from pointbook_client import requests
from pointbook_client.attempts import Attempts
from pointbook_client.calls import usable_request_id
from pointbook_client.channels import AioChannel
from pointbook_client.connections import AioConnection
from pointbook_client.errors import PointbookError
from pointbook_client.identity import Buyer, CustomerRef
from pointbook_client.models import (
    CustomerPoints,
    ExpiringPoints,
    IssuedCode,
    PointsAccount,
    PointsEntry,
    Redemption,
    Validation,
)
from pointbook_client.options import ConnectOptions, Token, connect_settings
from pointbook_client.requests import (
    AmountOptions,
    EntryFilter,
    PagedRequest,
    PagedResponse,
    RedeemOptions,
    RedemptionFilter,
    ValidateOptions,
)
from pointbook_client.retrying import (
    RETRY_SECONDS,
    UpdateBatch,
    UpdateResult,
    may_succeed_later,
    pause_before_retry,
    retry_pauses,
)
from pointbook_client.tls import CredentialsSource, Tls

T = TypeVar("T")
Q = TypeVar("Q", bound=PagedRequest)
P = TypeVar("P", bound=PagedResponse)


class PendingCall(Generic[T]):
    """A redemption or reversal that is ready to be sent.

    Store its reference first. Then a lost answer is safe: send it again, or build the same call with the same reference
    in another process. The server carries it out once.

    >>> call = client.redeem(customer, program_id=1, points=10)
    >>> first = await call.send()
    >>> again = await client.redeem(customer, program_id=1, points=10, reference=call.reference).send()
    >>> again.redemption_id == first.redemption_id
    True
    """

    def __init__(self, reference: str, send: Callable[[], Awaitable[T]], timeout_seconds: float) -> None:
        self.reference = reference
        """The API's external_reference_number."""
        self._send = send
        self._attempts = Attempts(timeout_seconds)

    async def send(self) -> T:
        """Send the call, and return its result.

        A call that was sent before returns the first result. Raises PointbookError. If its `outcome_unknown` is false,
        the call is refused for good. If it is true, send the call again, until it returns or is refused for good: that
        takes at most the deadline of the earlier attempts and 20 seconds.
        """
        with self._attempts.attempt():
            return await self._send()

    def __repr__(self) -> str:
        return f"PendingCall({self.reference!r})"

    def __await__(self) -> Generator[None, None, T]:
        return self.send().__await__()


class PointbookClient:
    """A client of Pointbook over one connection, for the running event loop.

    Its methods cover what shops do. `points`, `redemptions`, `programs`, `customers`, `benefits`, `webhooks` and
    `access` are the generated stubs of all methods, with the same deadlines, retries and exceptions; each call on them
    may have its own `timeout` in seconds and `metadata`.
    """

    def __init__(self, channel: AioChannel) -> None:
        self.channel = channel
        """The channel, for stubs of other services on this server, such as health."""

    @cached_property
    def access(self) -> "access_pb2_grpc.AccessServiceAsyncStub":
        """The stub of AccessService."""
        return access_pb2_grpc.AccessServiceStub(self.channel)

    @cached_property
    def benefits(self) -> "benefits_pb2_grpc.BenefitsServiceAsyncStub":
        """The stub of BenefitsService."""
        return benefits_pb2_grpc.BenefitsServiceStub(self.channel)

    @cached_property
    def customers(self) -> "customers_pb2_grpc.CustomersServiceAsyncStub":
        """The stub of CustomersService."""
        return customers_pb2_grpc.CustomersServiceStub(self.channel)

    @cached_property
    def points(self) -> "points_pb2_grpc.PointsServiceAsyncStub":
        """The stub of PointsService."""
        return points_pb2_grpc.PointsServiceStub(self.channel)

    @cached_property
    def programs(self) -> "programs_pb2_grpc.ProgramsServiceAsyncStub":
        """The stub of ProgramsService."""
        return programs_pb2_grpc.ProgramsServiceStub(self.channel)

    @cached_property
    def redemptions(self) -> "redemption_pb2_grpc.RedemptionServiceAsyncStub":
        """The stub of RedemptionService."""
        return redemption_pb2_grpc.RedemptionServiceStub(self.channel)

    @cached_property
    def webhooks(self) -> "webhooks_pb2_grpc.WebhooksServiceAsyncStub":
        """The stub of WebhooksService."""
        return webhooks_pb2_grpc.WebhooksServiceStub(self.channel)

    def with_options(self, *, timeout: float | None = None, request_id: str | None = None) -> "PointbookClient":
        """Return a client over the same connection with other options.

        `timeout` is in seconds. The request id shows in the server's log and in errors: pass that of the request that
        your service works on. One that is not 1 to 64 letters, digits, `.`, `_` and `-` is replaced by a new one.

        >>> checkout = client.with_options(timeout=5, request_id="checkout-17")
        >>> await checkout.get_redemption(customer.merchant_id, reference="none")
        Traceback (most recent call last):
        pointbook_client.reasons.RedemptionNotFoundError: NOT_FOUND: ... (request checkout-17)
        """
        defaults = self.channel.defaults
        changed = replace(
            defaults,
            timeout_seconds=defaults.timeout_seconds if timeout is None else timeout,
            request_id=defaults.request_id if request_id is None else usable_request_id(request_id),
        )
        return PointbookClient(self.channel.with_defaults(changed))

    async def close(self) -> None:
        """Close the connection. Running calls raise CallCancelledError."""
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def validate(
        self, customer: CustomerRef, program_id: int, points: int | None = None, **options: Unpack[ValidateOptions]
    ) -> Validation:
        """Return whether a customer may redeem points now.

        "No" is an answer, with every reason.

        >>> validation = await client.validate(customer, program_id=1, points=500)
        >>> validation.redeemable, [violation.reason for violation in validation.violations]
        (False, ['INSUFFICIENT_POINTS'])
        """
        request = requests.validate(customer, program_id, points, options)
        return Validation.from_message(await self.redemptions.ValidateRedemption(request))

    async def issue_code(
        self, customer: CustomerRef, program_id: int, points: int | None = None, **options: Unpack[AmountOptions]
    ) -> IssuedCode:
        """Send the customer a one-time code for exactly this amount.

        Returns where it went, never the code. Raises PointbookError, a FailedPreconditionError if the points may not be
        redeemed.
        """
        request = requests.issue_code(customer, program_id, points, options)
        return IssuedCode.from_message((await self.redemptions.IssueValidationCode(request)).issued_code)

    def redeem(
        self,
        customer: CustomerRef,
        program_id: int,
        points: int | None = None,
        *,
        reference: str | None = None,
        **options: Unpack[RedeemOptions],
    ) -> PendingCall[Redemption]:
        """Return a redemption to send. This sends nothing.

        It has a new reference unless one is given. Store `reference` of the returned call, then await the call.

        >>> call = client.redeem(customer, program_id=1, points=30, transaction_number="2024-17")
        >>> redemption = await call.send()
        >>> redemption.points, redemption.state
        (30, <RedemptionState.PENDING: 'PENDING'>)
        """
        request = requests.redeem(customer, program_id, points, reference, options)

        async def send() -> Redemption:
            return Redemption.from_message((await self.redemptions.RedeemPoints(request)).redemption)

        return PendingCall(request.external_reference_number, send, self.channel.defaults.timeout_seconds)

    def reverse(
        self,
        merchant_id: str,
        *,
        redemption_id: str | None = None,
        redeemed_reference: str | None = None,
        points: int | None = None,
        reference: str | None = None,
        notes: str = "",
    ) -> PendingCall[Redemption]:
        """Return a reversal to send. This sends nothing.

        It has a new reference of its own unless one is given. The redemption is named by its id or its reference.
        Without `points`, all that is left of it is reversed.

        >>> redemption = await client.redeem(customer, program_id=1, points=30).send()
        >>> call = client.reverse(customer.merchant_id, redemption_id=redemption.redemption_id, points=10)
        >>> redemption = await call.send()
        >>> redemption.reversed_points
        10
        """
        request = requests.reverse(
            merchant_id,
            redemption_id=redemption_id,
            redeemed_reference=redeemed_reference,
            points=points,
            reference=reference,
            notes=notes,
        )

        async def send() -> Redemption:
            return Redemption.from_message((await self.redemptions.ReverseRedemption(request)).redemption)

        return PendingCall(request.external_reference_number, send, self.channel.defaults.timeout_seconds)

    async def get_redemption(
        self, merchant_id: str, *, redemption_id: str | None = None, reference: str | None = None
    ) -> Redemption:
        """Return a redemption, by its id or its reference.

        Raises RedemptionNotFoundError. That is final 20 seconds after the deadlines of all calls with this reference.
        """
        request = requests.get_redemption(merchant_id, redemption_id=redemption_id, reference=reference)
        return Redemption.from_message((await self.redemptions.GetRedemption(request)).redemption)

    async def list_redemptions(
        self, merchant_id: str, **selected: Unpack[RedemptionFilter]
    ) -> AsyncIterator[Redemption]:
        """Yield a merchant's redemptions, newest first, page by page.

        >>> redemption = await client.redeem(customer, program_id=1, points=10).send()
        >>> [each.points async for each in client.list_redemptions(customer.merchant_id, customer=customer)]
        [10]
        """
        request = requests.list_redemptions(merchant_id, selected)
        async for page in self.pages(self.redemptions.ListRedemptions, request):
            for redemption in page.redemptions:
                yield Redemption.from_message(redemption)

    async def get_customer_points(self, customer: CustomerRef, program_id: int) -> CustomerPoints:
        """Return the points of a customer in a program.

        >>> points = await client.get_customer_points(customer, program_id=1)
        >>> points.active_points, points.held_points
        (100, 0)
        """
        request = requests.get_customer_points(customer, program_id)
        return CustomerPoints.from_message(await self.redemptions.GetCustomerPoints(request))

    async def get_points_account(
        self, merchant_id: str, buyer: Buyer, *, at_time: datetime | None = None, with_lots: bool = True
    ) -> PointsAccount:
        """Return the account of a buyer, as of now or of `at_time`."""
        request = requests.get_points_account(merchant_id, buyer, at_time=at_time, with_lots=with_lots)
        return PointsAccount.from_message((await self.points.GetPointsAccount(request)).account)

    async def list_points_entries(
        self, merchant_id: str, buyer: Buyer, **selected: Unpack[EntryFilter]
    ) -> AsyncIterator[PointsEntry]:
        """Yield the entries of an account, newest first, page by page."""
        request = requests.list_points_entries(merchant_id, buyer, selected)
        async for page in self.pages(self.points.ListPointsEntries, request):
            for entry in page.entries:
                yield PointsEntry.from_message(entry)

    async def list_expiring_points(
        self,
        merchant_id: str,
        *,
        until_time: datetime,
        from_time: datetime | None = None,
        store_id: str | None = None,
        program_id: int | None = None,
    ) -> AsyncIterator[ExpiringPoints]:
        """Yield the points of a store or program that expire before `until_time`."""
        request = requests.list_expiring_points(
            merchant_id, store_id=store_id, program_id=program_id, until_time=until_time, from_time=from_time
        )
        async for page in self.pages(self.points.ListExpiringPoints, request):
            for item in page.items:
                yield ExpiringPoints.from_message(item)

    async def apply_updates(
        self,
        updates: Iterable[points_pb2.PointsUpdate],
        *,
        outcomes_only: bool = True,
        retry_seconds: float = RETRY_SECONDS,
        on_retry: Callable[[PointbookError], None] | None = None,
    ) -> list[UpdateResult]:
        """Apply points updates in batches.

        Returns the response or the error of each, in their order. Updates that a retry may help are sent again, and
        `on_retry` gets the error that led to it. Raises that error after `retry_seconds`, and others that concern all
        updates at once; it is safe to send all of them again.
        """
        batch = UpdateBatch(updates, outcomes_only=outcomes_only)
        give_up_at, pauses = time.monotonic() + retry_seconds, retry_pauses()
        while (request := batch.request()) is not None:
            try:
                failures = batch.receive(await self.points.BatchApplyPointsUpdates(request))
            except PointbookError as error:
                if not may_succeed_later(error):
                    raise
                failures = [error]
            if not failures:
                continue
            if time.monotonic() > give_up_at:
                raise failures[0]
            if on_retry is not None:
                on_retry(failures[0])
            await asyncio.sleep(pause_before_retry(next(pauses), failures))
        return batch.results()

    async def pages(self, method: Callable[[Q], Awaitable[P]], request: Q) -> AsyncIterator[P]:
        """Yield the pages of a List method of a stub.

        A method is like `client.programs.ListStores`. The request stays unchanged.

        >>> from pointbook.v1.programs_pb2 import ListStoresRequest
        >>> request = ListStoresRequest(merchant_id=customer.merchant_id)
        >>> async for page in client.pages(client.programs.ListStores, request):
        ...     print(len(page.stores), "store")
        1 store
        """
        page_request = requests.copy_of(request)
        while True:
            page = await method(page_request)
            yield page
            if not page.next_page_token:
                return
            page_request.page_token = page.next_page_token


def connect(
    address: str,
    *,
    token: Token = None,
    tls: Tls | CredentialsSource | bool | None = None,
    **options: Unpack[ConnectOptions],
) -> PointbookClient:
    """Return a client of the server at an address.

    An address is like `points.internal:50051` or `dns:///points:50051`, of which the client uses all servers.

    Without `tls` it is in plaintext on loopback, and uses TLS with gRPC's own roots elsewhere; `tls=False` is for a
    network that encrypts by itself. Nothing is sent yet. Call it in the running event loop.

    Raises OSError if a file of `tls` cannot be read.

    >>> async with connect(address, token=token) as client:
    ...     validation = await client.validate(customer, program_id=1, points=10)
    >>> validation.redeemable
    True
    """
    settings = connect_settings(address, token, tls, options)
    return PointbookClient(AioChannel(AioConnection(settings), settings.defaults))
