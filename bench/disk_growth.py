"""The growth of the tables with each kind of call: docs/retention.md.

Some ten thousand calls of each kind run on a new database, with ids as long as in production. The growth of every
table, with its indexes, is then scaled to a million. Nothing is deleted meanwhile.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import uvloop
from google.protobuf.timestamp_pb2 import Timestamp

from load.jobs import CallKind, Job
from load.requests import PROGRAM_ID, RequestGenerator
from pointbook.v1 import (
    customers_pb2,
    customers_pb2_grpc,
    identity_pb2,
    points_pb2_grpc,
    redemption_pb2,
    redemption_pb2_grpc,
    webhooks_pb2,
    webhooks_pb2_grpc,
)
from scenarios.populations import OPENED_AT_MS, AccountIds, Population, new_event_id
from servers.database import connect, prepare_database, run_postgres, server_environment
from servers.subprocesses import run_server

MILLION = 1_000_000
CALLS = 10_000
UPDATES = 100_000
UPDATES_IN_CALL = 500
IN_FLIGHT = 16
REFUSALS_MAX = 500
"""Fewer refusals than a server stores in a minute."""
CALL_SECONDS_MAX = 30.0
REFUSED_POINTS = 15
"""Not a multiple of 10, as the program demands."""
REFUSALS_SECONDS = 2.5
"""After this time the server has written the refusals that it queued."""
SIZES = """
    SELECT relname, pg_total_relation_size(oid) AS bytes FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
"""
BUILD = Path(__file__).resolve().parents[1] / "build"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of call.

    Each request has `size` operations, of which at most `calls_max` are measured.
    """

    name: str
    method: Callable[..., Any]
    requests: Iterator[Any]
    size: int = 1
    calls_max: int = MILLION


async def list_kinds(
    channel: grpc.aio.Channel, population: Population, connection: asyncpg.Connection
) -> AsyncIterator[Kind]:
    """Yield the kinds of calls.

    Some need the results of earlier ones, so each is run before the next.
    """
    points = points_pb2_grpc.PointsServiceStub(channel)
    redemption = redemption_pb2_grpc.RedemptionServiceStub(channel)
    customers = customers_pb2_grpc.CustomersServiceStub(channel)
    webhooks = webhooks_pb2_grpc.WebhooksServiceStub(channel)
    generator = RequestGenerator()
    accounts = [population.ids(number) for number in range(population.accounts)]

    def requests(kind: CallKind) -> Iterator[Any]:
        return generator.requests(Job(kind, "", "", population, IN_FLIGHT, 0, updates=UPDATES_IN_CALL))

    yield Kind("points updates", points.BatchApplyPointsUpdates, requests(CallKind.BATCH), UPDATES_IN_CALL)
    yield Kind("redemptions", redemption.RedeemPoints, requests(CallKind.REDEEM))
    settled = [_settle(**row) for row in await connection.fetch("SELECT merchant_id, redemption_id FROM redemptions")]
    yield Kind("redemptions settled by hand", redemption.SettleRedemption, iter(settled))
    yield Kind("codes sent", redemption.IssueValidationCode, requests(CallKind.ISSUE))
    refused = map(_refused, itertools.cycle(accounts))
    yield Kind("refused validations", redemption.ValidateRedemption, refused, calls_max=REFUSALS_MAX)
    yield Kind("customer webhooks, new customers", customers.ApplyCustomerUpdate, map(_customer, accounts))
    yield Kind("customer webhooks, later ones", customers.ApplyCustomerUpdate, map(_customer, accounts))
    redacted = [_redact(**row) for row in await connection.fetch("SELECT merchant_id, customer_id FROM customers")]
    yield Kind("redactions", customers.RedactCustomer, iter(redacted))
    yield Kind("webhooks in quarantine", webhooks.QuarantineWebhook, map(_quarantined, accounts))


def _settle(merchant_id: str, redemption_id: str) -> redemption_pb2.SettleRedemptionRequest:
    return redemption_pb2.SettleRedemptionRequest(
        merchant_id=merchant_id, redemption_id=redemption_id, reason="the webhook was lost"
    )


def _redact(merchant_id: str, customer_id: str) -> customers_pb2.RedactCustomerRequest:
    return customers_pb2.RedactCustomerRequest(
        merchant_id=merchant_id, customer_id=customer_id, reason="requested by letter"
    )


def _refused(account: AccountIds) -> redemption_pb2.ValidateRedemptionRequest:
    buyer = identity_pb2.Buyer(store_id=account.store_id, buyer_id=account.buyer_id)
    customer = identity_pb2.CustomerRef(merchant_id=account.merchant_id, buyer=buyer)
    return redemption_pb2.ValidateRedemptionRequest(customer=customer, program_id=PROGRAM_ID, points=REFUSED_POINTS)


_numbers = itertools.count(1)


def _customer(account: AccountIds) -> customers_pb2.ApplyCustomerUpdateRequest:
    number = next(_numbers)
    return customers_pb2.ApplyCustomerUpdateRequest(
        **account._asdict(),
        event_id=new_event_id(),
        kind=customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
        mobile=f"+86138{number:08}",
        email=f"customer-{number}@example.com",
        updated_at=Timestamp(seconds=OPENED_AT_MS // 1_000 + number),
    )


def _quarantined(account: AccountIds) -> webhooks_pb2.QuarantineWebhookRequest:
    body = {"buyer_id": account.buyer_id, "store_id": account.store_id, "updated_at": next(_numbers), "note": "x" * 200}
    headers = {"x-shopline-webhook-id": "5f8d0d55b54764421b7156c3", "x-shopline-shop-domain": "example.myshopline.com"}
    return webhooks_pb2.QuarantineWebhookRequest(
        merchant_id=account.merchant_id,
        topic="app_memberSystem_points/challenged",
        headers=[webhooks_pb2.WebhookHeader(name=name, value=value) for name, value in headers.items()],
        body=json.dumps(body).encode(),
        reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
        detail="a benchmark",
    )


async def main(*, calls: int, updates: int) -> None:
    """Run the calls of each kind, and print the growth of the tables after each."""
    BUILD.mkdir(exist_ok=True)
    population = Population("growing", max(calls, updates // 10))
    with tempfile.TemporaryDirectory(prefix="disk-growth-", dir=BUILD) as name:
        async with run_postgres(Path(name)) as postgres:
            token = await prepare_database(postgres.url(), [population])
            connection = await connect(postgres.url())
            async with run_server("pointbook", server_environment(postgres)) as server:
                metadata = (("authorization", f"Bearer {token}"),)
                async with grpc.aio.insecure_channel(server.address) as channel:
                    async for kind in list_kinds(channel, population, connection):
                        count = min(kind.calls_max, calls if kind.size == 1 else updates)
                        before = await _read_sizes(connection)
                        await _run(kind, count // kind.size, metadata)
                        _print(kind, count, before, await _read_sizes(connection))
            await connection.close()


async def _run(kind: Kind, calls: int, metadata: tuple[tuple[str, str], ...]) -> None:
    """Send the requests of a kind, a few at a time."""
    requests = itertools.islice(kind.requests, calls)

    async def send() -> None:
        for request in requests:
            await kind.method(request, metadata=metadata, timeout=CALL_SECONDS_MAX)

    await asyncio.gather(*(send() for _ in range(IN_FLIGHT)))


async def _read_sizes(connection: asyncpg.Connection) -> dict[str, int]:
    """Return the size of each table with its indexes, once every row is in its table."""
    await asyncio.sleep(REFUSALS_SECONDS)
    return {row["relname"]: row["bytes"] for row in await connection.fetch(SIZES)}


def _print(kind: Kind, count: int, before: dict[str, int], after: dict[str, int]) -> None:
    """Print how much each table that grew would grow with a million calls."""
    growth = {name: (after[name] - before[name]) / count for name in after if after[name] - before[name] > count}
    print(f"{kind.name}: {sum(growth.values()):,.0f} MB a million, measured with {count:,}")
    for name, size in sorted(growth.items(), key=lambda each: -each[1]):
        print(f"    {name:<24}{size:>8,.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure how much the tables grow with a million calls.")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"calls of each kind ({CALLS:,})")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"points updates, which share calls ({UPDATES:,})")
    options = parser.parse_args()
    uvloop.run(main(calls=options.calls, updates=options.updates))
