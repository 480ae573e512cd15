"""`pointbook store` on a real server."""

from pointbook.v1 import identity_pb2, programs_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import Scope
from support.clients import Client
from support.clocks import NOW_MS, at
from support.processes import Finished, one_line, pointbook
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

WHY = ("--reason", "merchants/redact of May")


async def test_erase_closes_the_stores_request(
    client: Client, service: Service, shop: Shop, settings: dict[str, str]
) -> None:
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "alice", email=f"{unique('a')}@example.com", buyers=buyers)
    await client.apply(shop.update("buyer"))
    await client.programs.RequestStoreErasure(
        programs_pb2.RequestStoreErasureRequest(
            event_id="e-1", merchant_id=shop.merchant_id, store_id=shop.store_id, request_time=at(NOW_MS)
        )
    )
    merchant = ("--merchant", shop.merchant_id)
    before = await pointbook("store", "erasures", **settings)
    erased = await pointbook("store", "erase", shop.store_id, *merchant, *WHY, **settings)
    again = await pointbook("store", "erase", shop.store_id, *merchant, *WHY, **settings)
    after = await pointbook("store", "erasures", *merchant, **settings)
    verified = await pointbook("verify", *merchant, DATABASE_URL=service.database_url)

    due, now = at(NOW_MS + 30 * 24 * 60 * 60 * 1_000).ToJsonString(), at(NOW_MS).ToJsonString()
    names = f"{shop.merchant_id}  {shop.store_id}"
    assert before.exit_code == 0
    assert [line.split(due)[1] for line in before.out.splitlines() if line.startswith(names)] == [f"  requested {now}"]
    assert erased == Finished(0, f"Store {shop.store_id} is erased; buyers that lost personal data: 1.\n", "")
    assert again == Finished(0, f"Store {shop.store_id} is erased; buyers that lost personal data: 0.\n", "")
    assert after.out == f"{names}  CLOSED {now}  requested {now}  merchants/redact of May\n"
    assert verified.exit_code == 0, verified
    assert not (await client.customer(shop.merchant_id, "alice")).email


async def test_errors_of_operators_are_reported_in_one_line(
    service: Service, shop: Shop, settings: dict[str, str]
) -> None:
    merchant = ("--merchant", shop.merchant_id)
    lists = await make_token(service.database_url, [shop.merchant_id], [Scope.STORES])
    away = await pointbook("store", "erasures", "--server", f"127.0.0.1:{free_port()}")
    forbidden = await pointbook("store", "erasures", **{**settings, "TOKEN": lists})
    denied = await pointbook("store", "erase", shop.store_id, *merchant, *WHY, **{**settings, "TOKEN": lists})
    unknown = await pointbook("store", "erase", "nowhere", *merchant, *WHY, **settings)
    blank = await pointbook("store", "erase", shop.store_id, *merchant, "--reason", " ", **settings)

    assert one_line(away).startswith("UNAVAILABLE: ")
    assert one_line(forbidden).startswith("PERMISSION_DENIED: MERCHANT_FORBIDDEN: ")
    assert one_line(denied).startswith("PERMISSION_DENIED: SCOPE_MISSING: The token lacks the scope admin. (request ")
    assert one_line(unknown).startswith("NOT_FOUND: STORE_NOT_FOUND: ")
    assert "(reason: is required)" in one_line(blank)


async def test_a_store_is_released(service: Service, client: Client, shop: Shop, settings: dict[str, str]) -> None:
    nonempty = Shop(shop.merchant_id, unique("store"))
    await client.put_store(nonempty.merchant_id, nonempty.store_id)
    await client.apply(nonempty.update())
    merchant, why = ("--merchant", shop.merchant_id), ("--reason", "a wrong merchant")
    own = await make_token(service.database_url, [shop.merchant_id], list(Scope))
    denied = await pointbook("store", "release", shop.store_id, *merchant, *why, **{**settings, "TOKEN": own})
    released = await pointbook("store", "release", shop.store_id, *merchant, *why, **settings)
    again = await pointbook("store", "release", shop.store_id, *merchant, *why, **settings)
    in_use = await pointbook("store", "release", nonempty.store_id, *merchant, *why, **settings)

    assert one_line(denied).startswith("PERMISSION_DENIED: MERCHANT_FORBIDDEN: ")
    assert released == Finished(0, f"Store {shop.store_id} is released.\n", "")
    assert one_line(again).startswith("NOT_FOUND: STORE_NOT_FOUND: ")
    assert one_line(in_use).startswith("FAILED_PRECONDITION: STORE_IN_USE: ")
