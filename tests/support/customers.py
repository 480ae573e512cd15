"""Customer updates, and what customers are after them."""

import itertools
from typing import Any

import grpc

from pointbook.v1 import customers_pb2, identity_pb2
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import fetch_rows
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

CREATED = customers_pb2.CUSTOMER_UPDATE_KIND_CREATED
UPDATED = customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED
DELETED = customers_pb2.CUSTOMER_UPDATE_KIND_DELETED
REDACTED = customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
TYPE_MOBILE = identity_pb2.IDENTIFIER_TYPE_MOBILE
TYPE_EMAIL = identity_pb2.IDENTIFIER_TYPE_EMAIL
INVALID = customers_pb2.SKIPPED_IDENTIFIER_CAUSE_INVALID
TAKEN = customers_pb2.SKIPPED_IDENTIFIER_CAUSE_TAKEN

_digits = itertools.count(1_234)


def mobile() -> str:
    """Return a mobile number that no other test uses."""
    return f"+86138{next(_digits) % 100_000_000:08}"


def email() -> str:
    """Return an e-mail address that no other test uses."""
    return f"{unique('person')}@example.com"


def update_outcome(answer: customers_pb2.ApplyCustomerUpdateResponse) -> str:
    """Return the outcome of an update."""
    return customers_pb2.CustomerUpdateOutcome.Name(answer.outcome).removeprefix("CUSTOMER_UPDATE_OUTCOME_")


def skipped_causes(answer: customers_pb2.ApplyCustomerUpdateResponse) -> dict[int, int]:
    """Return the identifiers that an update skipped, with the causes."""
    return {item.identifier_type: item.cause for item in answer.skipped_identifiers}


def customer_update(shop: Shop, buyer_id: str = "buyer", **changes: Any) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Return a customer update."""
    values: dict[str, Any] = {
        "event_id": unique("event"),
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "buyer_id": buyer_id,
        "kind": UPDATED,
        "updated_at": at(NOW_MS - 60_000),
    }
    return customers_pb2.ApplyCustomerUpdateRequest(**(values | changes))


async def customer_or_none(client: Client, request: customers_pb2.GetCustomerRequest) -> customers_pb2.Customer:
    """Return a customer; an empty message without one."""
    try:
        return (await client.customers.GetCustomer(request)).customer
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return customers_pb2.Customer()


async def find_customer_id(client: Client, shop: Shop, **identifier: Any) -> str:
    """Return the id of an identifier's owner; empty without one."""
    ref = identity_pb2.CustomerRef(**identifier)
    request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer=ref)
    return (await customer_or_none(client, request)).customer_id


async def contacts_of_buyer(client: Client, shop: Shop, buyer_id: str = "buyer") -> tuple[str, str]:
    """Return the mobile number and e-mail address of a buyer's customer."""
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    ref = identity_pb2.CustomerRef(buyer=buyer)
    request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer=ref)
    customer = await customer_or_none(client, request)
    return customer.mobile, customer.email


async def move_identifier(client: Client, shop: Shop, giver: str, receiver: str, **identifier: Any) -> tuple[str, str]:
    """Move an identifier, and return both etags."""
    request = customers_pb2.MoveIdentifierRequest(
        merchant_id=shop.merchant_id,
        from_customer_id=giver,
        to_customer_id=receiver,
        reason="the till registered twice",
        **identifier,
    )
    answer = await client.customers.MoveIdentifier(request)
    return answer.from_etag, answer.to_etag


async def redact_customer(client: Client, shop: Shop, customer_id: str) -> int:
    """Redact a customer, and return up to which time."""
    request = customers_pb2.RedactCustomerRequest(
        merchant_id=shop.merchant_id, customer_id=customer_id, reason="requested by letter"
    )
    return (await client.customers.RedactCustomer(request)).redact_time.ToMilliseconds()


async def read_all_tables(service: Service) -> str:
    """Return every row of every table as text."""
    tables = await fetch_rows(service, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    written = [await fetch_rows(service, f"SELECT t.*::text AS row FROM {table['tablename']} AS t") for table in tables]  # noqa: S608 - names of our tables
    return "\n".join(row["row"] for table in written for row in table)


async def find_needless_claims(service: Service, shop: Shop) -> list[Any]:
    """Return the claims that should have ended.

    No other customer owns their contact, or their customer has such a contact.
    """
    return await fetch_rows(
        service,
        """
        SELECT * FROM customer_claims AS c WHERE merchant_id = $1 AND (
            NOT EXISTS (
                SELECT FROM customer_identifiers AS i
                WHERE i.value = c.value AND i.kind = c.kind AND i.source = '' AND i.merchant_id = c.merchant_id
                    AND i.customer_id <> c.customer_id
            ) OR EXISTS (
                SELECT FROM customer_identifiers AS i
                WHERE i.customer_id = c.customer_id AND i.kind = c.kind AND i.source = ''
                    AND i.merchant_id = c.merchant_id
            )
        )
        """,
        shop.merchant_id,
    )
