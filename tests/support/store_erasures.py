"""Requests to erase stores, and their erasure."""

from typing import Any

from pointbook.v1 import programs_pb2
from pointbook_common.durations import DAY_MS
from support.clients import Client
from support.clocks import NOW_MS, at
from support.shops import Shop
from support.unique_names import unique

REQUEST_MS = NOW_MS - 2 * DAY_MS
REASON = "merchants/redact of May"


async def request_erasure(client: Client, shop: Shop, **changes: Any) -> programs_pb2.RequestStoreErasureResponse:
    """Request the erasure of a store."""
    values: dict[str, Any] = {
        "event_id": unique("erasure"),
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "request_time": at(REQUEST_MS),
    }
    return await client.programs.RequestStoreErasure(programs_pb2.RequestStoreErasureRequest(**(values | changes)))


def erasure_outcome(answer: programs_pb2.RequestStoreErasureResponse) -> str:
    """Return the outcome of a request."""
    return programs_pb2.StoreErasureOutcome.Name(answer.outcome).removeprefix("STORE_ERASURE_OUTCOME_")


async def erase_store(client: Client, shop: Shop) -> programs_pb2.EraseStoreResponse:
    """Erase a part of a store."""
    request = programs_pb2.EraseStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id, reason=REASON)
    return await client.programs.EraseStore(request)


async def list_erasures(client: Client, merchant_id: str, page_size: int = 0) -> list[programs_pb2.StoreErasure]:
    """Return all pages of a merchant's requests."""
    request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id, page_size=page_size)
    pages: list[programs_pb2.StoreErasure] = []
    while True:
        page = await client.programs.ListStoreErasures(request)
        pages.extend(page.erasures)
        if not page.next_page_token:
            return pages
        request.page_token = page.next_page_token
