"""Calls that are cancelled at any moment: no partial writes, no leaks."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import (
    benefits_pb2,
    customers_pb2,
    points_pb2,
    programs_pb2,
    redemption_pb2,
    webhooks_pb2,
)
from support.clients import Client
from support.clocks import NOW_MS, at
from support.randomness import printed_random
from support.redemption import customer_ref
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique
from support.verification import run_verify
from support.waiting import until

CALLERS = 64
BUYERS = 40
CANCEL_SECONDS_MAX = 0.3
CALL_SECONDS_MAX = 30.0
OPEN_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle' AND pid <> $1"
)
ENTRIES = "SELECT event_id, buyer_id, updated_value FROM points_entries WHERE merchant_id = $1"
REFUSED_CODES = ("ALREADY_EXISTS", "FAILED_PRECONDITION", "NOT_FOUND", "RESOURCE_EXHAUSTED")
"""The codes of refused calls, such as for a buyer of another customer, a reversed redemption, or too many codes."""

Call = Callable[..., Any]


@pytest.mark.parametrize("calls", [500, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_cancelled_and_late_calls_are_done_once_or_not_at_all(
    service: Service, admin_token: str, shop: Shop, figure: Callable[[str, float | str, str], None], calls: int
) -> None:
    # Without interceptors: those of grpcio log errors for cancelled calls.
    client = Client(service.server.port)
    callers = CancellingCallers(client, admin_token, shop, printed_random())
    await callers.prepare(service.client)
    database = service.server._database
    connection = await asyncpg.connect(service.database_url)
    sessions = await _open_sessions(connection)
    tasks = len(asyncio.all_tasks())
    try:
        await callers.run(calls)
        await until(lambda: database.connections_in_use == 0, seconds=20.0)
        await until(lambda: len(asyncio.all_tasks()) <= tasks, seconds=20.0)
        # The server's own checks open a session for a moment too.
        await until(partial(_has_no_more_sessions, connection, sessions), seconds=20.0)
        await callers.repeat_all()
        await until(lambda: database.connections_in_use == 0, seconds=20.0)
        entries = await connection.fetch(ENTRIES, shop.merchant_id)
    finally:
        await connection.close()
    applied = Counter(row["event_id"] for row in entries)
    assert set(applied) == callers.events
    assert set(applied.values()) == {1}
    await callers.check_accounts(service.client, entries)
    await callers.check_redemptions(service.client)
    await client.close()
    await run_verify(service.database_url, shop.merchant_id)
    codes = " ".join(f"{name} {count}" for name, count in callers.codes.most_common())
    figure(f"{calls:,} cancelled or late calls: status codes", codes, "no partial write, no leak")
    assert set(callers.codes) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", *REFUSED_CODES}


class CancellingCallers:
    """Callers of all methods that write, which cancel most calls.

    A call may also have a short deadline.
    """

    def __init__(self, client: Client, token: str, shop: Shop, generator: random.Random) -> None:
        self._client, self._shop, self._random = client, shop, generator
        self._options: dict[str, Any] = {
            "timeout": CALL_SECONDS_MAX,
            "metadata": (("authorization", f"Bearer {token}"),),
        }
        self._repeatable: list[Call] = []
        self._redemption_ids: set[str] = set()
        self._references: set[str] = set()
        self._voidable: set[str] = set()
        self._voided: set[str] = set()
        self.events: set[str] = set()
        self.codes: Counter[str] = Counter()

    async def prepare(self, client: Client) -> None:
        """Add points for every buyer."""
        shop = self._shop
        self._program = await client.put_program(
            shop.merchant_id,
            shop.store_id,
            settlement_window={"seconds": 3_600},
            validation={"channels": [redemption_pb2.VALIDATION_TYPE_SMS]},
        )
        for number in range(BUYERS):
            update = shop.update(f"buyer-{number}", updated_value=10**6, points_balance=None)
            await client.apply(update)
            self.events.add(update.event_id)

    async def run(self, calls: int) -> None:
        """Make a number of calls, and cancel most of them."""
        remaining = iter(range(calls))

        async def caller() -> None:
            for _ in remaining:
                await self._call_and_cancel(self._random.choice(self._call_makers)())

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def repeat_all(self) -> None:
        """Repeat each call that writes points, then unvoid all entries."""
        for start in range(0, len(self._repeatable), CALLERS):
            responses = await asyncio.gather(*(call() for call in self._repeatable[start : start + CALLERS]))
            for response in responses:
                if isinstance(response, points_pb2.BatchApplyPointsUpdatesResponse):
                    assert not [result.error for result in response.results if result.HasField("error")]
        for event_id in self._voided:
            request = points_pb2.UnvoidPointsEntriesRequest(
                merchant_id=self._shop.merchant_id, event_ids=[event_id], reason="Voided by mistake."
            )
            await self._client.points.UnvoidPointsEntries(request, **self._options)

    async def check_accounts(self, client: Client, entries: list[Any]) -> None:
        """Check that every balance is the sum of the account's entries."""
        sums: Counter[str] = Counter()
        for row in entries:
            sums[row["buyer_id"]] += row["updated_value"]
        for buyer_id, points in sums.items():
            account = await client.account(self._shop.merchant_id, self._shop.store_id, buyer_id)
            assert (account.points_balance, account.drift) == (points, 0), buyer_id

    async def check_redemptions(self, client: Client) -> None:
        """Check that every redemption exists once."""
        found: Counter[str] = Counter()
        request = redemption_pb2.ListRedemptionsRequest(merchant_id=self._shop.merchant_id, page_size=1_000)
        while True:
            page = await client.redemption.ListRedemptions(request)
            found.update(each.external_reference_number for each in page.redemptions)
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        assert set(found) == self._references
        assert set(found.values()) <= {1}

    async def _call_and_cancel(self, call: Call) -> None:
        seconds = CANCEL_SECONDS_MAX * self._random.random() ** 2
        kind = self._random.random()
        running: Any = call(timeout=seconds) if kind < 0.45 else call()
        try:
            if kind < 0.9:
                await asyncio.wait([task := asyncio.ensure_future(running)], timeout=seconds)
                if kind >= 0.45:
                    task.cancel()
                running = task
            response = await running
        except asyncio.CancelledError:
            self.codes["CANCELLED"] += 1
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
        else:
            self.codes["OK"] += 1
            if isinstance(response, redemption_pb2.RedeemPointsResponse):
                self._redemption_ids.add(response.redemption.redemption_id)

    @property
    def _call_makers(self) -> tuple[Callable[[], Call], ...]:
        frequent = (self._apply, self._batch, self._redeem, self._redeem)
        return (
            *frequent,
            self._reverse,
            self._settle,
            self._void,
            self._issue,
            self._put,
            self._update_customer,
            self._quarantine,
        )

    def _update(self) -> points_pb2.PointsUpdate:
        update = self._shop.update(self._buyer(), updated_value=1, points_balance=None)
        self.events.add(update.event_id)
        self._voidable.add(update.event_id)
        return update

    def _buyer(self) -> str:
        return f"buyer-{self._random.randrange(BUYERS)}"

    def _apply(self) -> Call:
        return self._repeatable_call(
            self._client.points.ApplyPointsUpdate, points_pb2.ApplyPointsUpdateRequest(update=self._update())
        )

    def _batch(self) -> Call:
        updates = [self._update() for _ in range(3)]
        return self._repeatable_call(
            self._client.points.BatchApplyPointsUpdates, points_pb2.BatchApplyPointsUpdatesRequest(updates=updates)
        )

    def _redeem(self) -> Call:
        reference = unique("order")
        self._references.add(reference)
        request = redemption_pb2.RedeemPointsRequest(
            customer=customer_ref(self._shop, self._buyer()),
            program_id=1,
            points=10,
            external_reference_number=reference,
        )
        return self._repeatable_call(self._client.redemption.RedeemPoints, request)

    def _repeatable_call(self, method: Any, request: Any) -> Call:
        """Return a call that `repeat_all` repeats with the same id."""
        call = self._call(method, request)
        self._repeatable.append(call)
        return call

    def _reverse(self) -> Call:
        request = redemption_pb2.ReverseRedemptionRequest(
            merchant_id=self._shop.merchant_id,
            redeemed_reference_number=self._choose(self._references),
            points=1,
            external_reference_number=unique("reversal"),
        )
        return self._call(self._client.redemption.ReverseRedemption, request)

    def _settle(self) -> Call:
        request = redemption_pb2.SettleRedemptionRequest(
            merchant_id=self._shop.merchant_id,
            redemption_id=self._choose(self._redemption_ids),
            reason="Entered manually.",
        )
        return self._call(self._client.redemption.SettleRedemption, request)

    def _void(self) -> Call:
        if not self._voidable:
            return self._apply()
        event_id = self._choose(self._voidable)
        self._voided.add(event_id)
        request = points_pb2.VoidPointsEntriesRequest(
            merchant_id=self._shop.merchant_id, event_ids=[event_id], reason="A test till."
        )
        return self._call(self._client.points.VoidPointsEntries, request)

    def _issue(self) -> Call:
        request = redemption_pb2.IssueValidationCodeRequest(
            customer=customer_ref(self._shop, self._buyer()), program_id=1, points=10
        )
        return self._call(self._client.redemption.IssueValidationCode, request)

    def _put(self) -> Call:
        merchant: dict[str, Any] = {"merchant_id": self._shop.merchant_id}
        number = self._random.randrange(BUYERS)
        customer_id, buyer_id = f"customer-{number}", f"buyer-{number}"
        buyer: Any = {"store_id": self._shop.store_id, "buyer_id": buyer_id}
        member: Any = {"customer_id": customer_id, "can_redeem": True}
        customer = customers_pb2.Customer(
            **merchant, customer_id=customer_id, mobile=f"+12025550{number:03}", buyers=[buyer]
        )
        group = customers_pb2.UserGroup(
            **merchant, group_id=f"group-{number}", primary_customer_id=customer_id, members=[member]
        )
        benefit = benefits_pb2.Benefit(**merchant, benefit_id=f"benefit-{number}")
        store = programs_pb2.Store(**merchant, store_id=self._shop.store_id)
        client = self._client
        puts: tuple[tuple[Any, Any], ...] = (
            (client.customers.PutCustomer, customers_pb2.PutCustomerRequest(customer=customer)),
            (client.customers.PutUserGroup, customers_pb2.PutUserGroupRequest(user_group=group)),
            (client.benefits.PutBenefit, benefits_pb2.PutBenefitRequest(benefit=benefit)),
            (client.programs.PutProgram, programs_pb2.PutProgramRequest(program=self._program)),
            (client.programs.PutStore, programs_pb2.PutStoreRequest(store=store)),
        )
        return self._call(*self._random.choice(puts))

    def _update_customer(self) -> Call:
        request = customers_pb2.ApplyCustomerUpdateRequest(
            event_id=unique("update"),
            merchant_id=self._shop.merchant_id,
            store_id=self._shop.store_id,
            buyer_id=self._buyer(),
            kind=customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
            email=f"{unique('someone')}@example.com",
            updated_at=at(NOW_MS - self._random.randrange(10**6)),
        )
        return self._call(self._client.customers.ApplyCustomerUpdate, request)

    def _quarantine(self) -> Call:
        request = webhooks_pb2.QuarantineWebhookRequest(
            merchant_id=self._shop.merchant_id,
            topic="app_memberSystem_points/challenged",
            body=unique("body").encode(),
            reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
        )
        return self._call(self._client.webhooks.QuarantineWebhook, request)

    def _call(self, method: Any, request: Any) -> Call:
        def call(**options: Any) -> Any:
            return method(request, **self._options | options)

        return call

    def _choose(self, values: set[str]) -> str:
        return self._random.choice(sorted(values)) if values else "none"


async def _has_no_more_sessions(connection: asyncpg.Connection, sessions: int) -> bool:
    """Return whether no more sessions are busy than before."""
    return await _open_sessions(connection) <= sessions


async def _open_sessions(connection: Any) -> int:
    count: int = await connection.fetchval(OPEN_SESSIONS, connection.get_server_pid())
    return count
