"""BatchApplyPointsUpdates and ListDriftingAccounts on a real database."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import points_pb2
from pointbook_server.db.database import Connection, Statement
from pointbook_server.ledger import fold
from support.clients import Client
from support.clocks import NOW_MS, at
from support.ledger import check_ledger
from support.points import (
    START_MS,
    apply_batch,
    buyer_account,
    count_rows,
    decrease,
    increase,
    list_entries,
    list_event_ids,
    list_request,
    outcomes_of,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

LEDGER_TABLE = re.compile(r"\b(points_\w+|stores)\b")
"""The server runs statements about other tables by itself at any time."""


@contextmanager
def statements() -> Iterator[list[str]]:
    """Record the SQL that runs in the meantime."""
    ran: list[str] = []

    def recording(method: Any) -> Any:
        async def record(self: Connection, statement: Statement, values: Mapping[str, Any] | None = None) -> Any:
            if LEDGER_TABLE.search(statement.sql):
                ran.append(" ".join(statement.sql.split()))
            return await method(self, statement, values)

        return record

    methods = {name: recording(getattr(Connection, name)) for name in ("fetch", "fetch_one", "execute")}
    with patch.multiple(Connection, **methods):
        yield ran


async def drifting(client: Client, shop: Shop, **filters: Any) -> points_pb2.ListDriftingAccountsResponse:
    """Return a page of a merchant's drifting accounts."""
    request = points_pb2.ListDriftingAccountsRequest(merchant_id=shop.merchant_id, **filters)
    return await client.points.ListDriftingAccounts(request)


# Batches.


async def test_the_results_of_a_batch_are_in_the_order_of_its_updates(
    client: Client, shop: Shop, service: Service
) -> None:
    updates = [
        increase(shop, 0, 20, 20),
        increase(shop, 0, 7, 7, buyer_id="another"),
        increase(shop, 20, 5, 55),
        increase(shop, 10, 30, 50),
        decrease(shop, 30, 15, 40),
    ]

    results = await apply_batch(client, *updates)

    assert outcomes_of(results) == ["APPLIED", "APPLIED", "APPLIED", "LATE", "APPLIED"]
    assert [result.response.account.buyer_id for result in results] == ["buyer", "another", "buyer", "buyer", "buyer"]
    assert [result.response.account.points_balance for result in results] == [20, 7, 55, 55, 40]
    assert [result.response.drift for result in results] == [0] * 5
    assert {result.response.account.merchant_id for result in results} == {shop.merchant_id}
    await check_ledger(service.database_url, shop.merchant_id)


async def test_a_failed_update_does_not_affect_the_others(client: Client, shop: Shop, service: Service) -> None:
    """Its error has the code, reason and metadata of a single call."""
    known = increase(shop, 0, 20, 20)
    await client.apply(known)
    updates = [
        increase(shop, 10, 5, 25),
        increase(shop, 11, 5, 30, store_id="unknown"),
        increase(shop, 12, 5, 30, event_id=known.event_id),
        decrease(shop, 13, 26, None),
        increase(shop, 14, -1, 30),
        decrease(shop, 15, 5, 20),
    ]

    results = await apply_batch(client, *updates)

    assert outcomes_of(results) == [
        "APPLIED",
        "STORE_NOT_FOUND",
        "EVENT_ID_REUSED",
        "INSUFFICIENT_POINTS",
        "INVALID_FIELDS",
        "APPLIED",
    ]
    codes = [grpc.StatusCode[name].value[0] for name in ("NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION")]
    assert [result.error.code for result in results[1:4]] == codes
    assert dict(results[1].error.metadata) == {"store_id": "unknown"}
    assert dict(results[2].error.metadata) == {"event_id": known.event_id}
    assert dict(results[3].error.metadata) == {"event_id": updates[3].event_id, "updated_value": "26"}
    assert all(result.error.message for result in results[1:5])
    assert results[5].response.account.points_balance == 20
    # The refusal is stored, as for a single call.
    assert (await refused(client.apply(updates[3]))).reason == "INSUFFICIENT_POINTS"
    await check_ledger(service.database_url, shop.merchant_id)


async def test_the_wrong_fields_of_an_update_have_the_same_paths_as_in_a_single_call(
    client: Client, shop: Shop
) -> None:
    wrong = shop.update(event_id="an event", updated_value=-1, updated_at=at(NOW_MS + 86_400_001))

    right, error = await apply_batch(client, shop.update(), wrong)

    assert right.response.account.points_balance == 20
    assert error.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    violations = {violation.field: violation.description for violation in error.error.violations}
    assert set(violations) == {"update.event_id", "update.updated_value", "update.updated_at"}
    assert all(violations.values())


async def test_merchants_in_one_call_do_not_share_a_transaction(client: Client, shop: Shop, service: Service) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    stranger = Shop(unique("merchant"), shop.store_id)
    event_id = unique("event")

    results = await apply_batch(
        client,
        shop.update(event_id=event_id),
        stranger.update(event_id=event_id),
        other.update(event_id=event_id, updated_value=7, points_balance=7),
        stranger.update(),
        shop.update(event_id=event_id),
    )

    assert outcomes_of(results) == ["APPLIED", "STORE_NOT_FOUND", "APPLIED", "STORE_NOT_FOUND", "DUPLICATE"]
    assert [results[index].response.account.points_balance for index in (0, 2, 4)] == [20, 7, 20]
    assert await count_rows(service, stranger.merchant_id) == (0, 0)


async def test_a_failed_transaction_of_a_merchant_does_not_affect_other_merchants(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    fetch = Connection.fetch

    async def broken(self: Connection, statement: Statement, values: Mapping[str, Any] | None = None) -> Any:
        if values is not None and other.merchant_id in values.get("merchant_id", ()):
            raise OSError("the connection is gone")
        return await fetch(self, statement, values)

    with monkeypatch.context() as patched:
        patched.setattr(Connection, "fetch", broken)
        results = await apply_batch(client, shop.update(), other.update(), shop.update("another"))

    assert outcomes_of(results) == ["APPLIED", "DATABASE_UNAVAILABLE", "APPLIED"]
    assert results[1].error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert await count_rows(service, other.merchant_id) == (0, 0)
    assert outcomes_of(await apply_batch(client, other.update())) == ["APPLIED"]


async def test_a_defect_affects_only_its_own_update_and_is_not_disclosed(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_one, guilty = Connection.fetch_one, shop.update("guilty")

    async def broken(self: Connection, statement: Statement, values: Mapping[str, Any] | None = None) -> Any:
        if guilty.event_id in str(values):
            raise ZeroDivisionError("a defect")
        return await fetch_one(self, statement, values)

    monkeypatch.setattr(Connection, "fetch_one", broken)
    results = await apply_batch(client, shop.update(), guilty, shop.update("another"))

    assert outcomes_of(results) == ["APPLIED", "INTERNAL", "APPLIED"]
    assert "defect" not in results[1].error.message


async def test_repeated_event_ids_follow_the_same_rules_in_a_batch_as_between_calls(
    client: Client, shop: Shop, service: Service
) -> None:
    first, refused_one = increase(shop, 0, 20, 20), decrease(shop, 10, 25, None)
    other_content = increase(shop, 0, 21, 21, event_id=first.event_id)
    same_content = increase(shop, 0, 20, 20)

    results = await apply_batch(client, first, first, other_content, same_content, refused_one, refused_one)

    assert outcomes_of(results) == [
        "APPLIED",
        "DUPLICATE",
        "EVENT_ID_REUSED",
        "DUPLICATE",
        "INSUFFICIENT_POINTS",
        "INSUFFICIENT_POINTS",
    ]
    assert await list_event_ids(client, shop) == [first.event_id]
    # The event_id of the duplicate is free.
    same_content.updated_at.CopyFrom(at(NOW_MS))
    same_content.points_balance = 40
    assert outcomes_of(await apply_batch(client, same_content)) == ["APPLIED"]
    await check_ledger(service.database_url, shop.merchant_id)


async def test_events_without_a_balance_are_checked_in_the_order_of_the_request(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20))

    results = await apply_batch(
        client, decrease(shop, 20, 15, None), decrease(shop, 10, 15, None), decrease(shop, 5, 5, None)
    )

    assert outcomes_of(results) == ["APPLIED", "INSUFFICIENT_POINTS", "LATE"]
    assert (await buyer_account(client, shop)).points_balance == 0


async def test_a_thousand_updates_in_reverse_order(client: Client, shop: Shop, service: Service) -> None:
    updates = [increase(shop, n, 1, n, buyer_id=f"buyer-{number}") for n in range(100, 0, -1) for number in range(10)]

    results = await apply_batch(client, *updates)

    assert len(results) == 1_000
    assert Counter(outcomes_of(results)) == {"APPLIED": 10, "LATE": 990}
    stored_ledger = await check_ledger(service.database_url, shop.merchant_id)
    assert {(stored.account.balance, stored.account.drift) for stored in stored_ledger.values()} == {(100, 0)}
    assert sum(len(stored.entries) for stored in stored_ledger.values()) == 1_000
    assert set(outcomes_of(await apply_batch(client, *reversed(updates)))) == {"DUPLICATE"}


async def test_late_events_are_folded_from_a_checkpoint_before_the_first_of_them(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is not the first of the batch, or has the time of a checkpoint."""
    monkeypatch.setattr(fold, "CHECKPOINT_ENTRIES", 2)
    await apply_batch(client, *(increase(shop, 10 * n, 1, 2 * n) for n in range(1, 11)))

    results = await apply_batch(client, increase(shop, 25, 1, 5), increase(shop, 95, 1, 19), increase(shop, 75, 1, 15))
    assert outcomes_of(results) == ["LATE"] * 3
    (stored,) = (await check_ledger(service.database_url, shop.merchant_id)).values()
    await apply_batch(client, increase(shop, sorted(stored.checkpoints)[3] - START_MS, 3, None))

    (stored,) = (await check_ledger(service.database_url, shop.merchant_id)).values()
    assert len(stored.entries) == 14
    assert len(stored.checkpoints) >= 5


@pytest.mark.parametrize("count", [0, 1_001])
async def test_a_batch_has_one_to_a_thousand_updates(client: Client, shop: Shop, service: Service, count: int) -> None:
    refusal = await refused(apply_batch(client, *(increase(shop, n, 1, n) for n in range(count))))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert set(refusal.fields) == {"updates"}
    assert await count_rows(service, shop.merchant_id) == (0, 0)


async def test_outcomes_only_leaves_out_the_accounts_alone(client: Client, shop: Shop) -> None:
    updates = [increase(shop, 1, 1, 1), increase(shop, 2, 1, 3), increase(shop, 2, 1, 3), increase(shop, 0, -1, 5)]
    request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates, outcomes_only=True)

    outcomes = list((await client.points.BatchApplyPointsUpdates(request)).results)
    again = await apply_batch(client, *updates)

    assert [result.response.HasField("account") for result in outcomes] == [False] * 4
    assert outcomes_of(outcomes) == ["APPLIED", "APPLIED", "DUPLICATE", "INVALID_FIELDS"]
    assert outcomes[1].response.drift == 1
    assert [result.response.HasField("account") for result in again] == [True] * 3 + [False]
    assert again[0].response.account.points_balance == 3


async def test_a_call_that_does_not_fit_in_the_queue_is_refused_as_a_whole(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.server.services.points_batcher, "_waiting_max", 2)

    refusal = await refused(apply_batch(client, *(increase(shop, n, 1, n) for n in range(1, 4))))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refusal.retry_seconds
    assert await count_rows(service, shop.merchant_id) == (0, 0)
    assert outcomes_of(await apply_batch(client, increase(shop, 1, 1, 1), increase(shop, 2, 1, 2))) == ["APPLIED"] * 2


async def statements_of(client: Client, updates: list[points_pb2.PointsUpdate]) -> list[str]:
    """Return the statements that a batch takes."""
    with statements() as ran:
        results = await apply_batch(client, *updates)
    assert set(outcomes_of(results)) <= {"APPLIED", "LATE"}
    return ran


async def test_a_batch_takes_as_many_statements_as_one_update(client: Client, shop: Shop) -> None:
    """For new accounts, for events applied directly, and for late events."""
    kinds: dict[str, list[list[str]]] = {"opening": [], "direct": [], "late": []}
    for count in (1, 10, 500):
        names = [f"{count}-{number}" for number in range(count)]
        for kind, after_ms, balance in (("opening", 0, 1), ("direct", 20, 3), ("late", 10, 2)):
            updates = [increase(shop, after_ms, 1, balance, buyer_id=name) for name in names]
            kinds[kind].append(await statements_of(client, updates))

    for kind, at_most in (("opening", 4), ("direct", 2), ("late", 8)):
        one, ten, many = kinds[kind]
        assert one == ten == many
        assert len(one) <= at_most, f"{kind}: {one}"


async def test_many_events_of_one_account_take_as_many_statements_as_one(client: Client, shop: Shop) -> None:
    """Checkpoints are written with the rest."""
    one = await statements_of(client, [increase(shop, 0, 1, 1)])
    many = await statements_of(client, [increase(shop, n, 1, n, buyer_id="many") for n in range(1, 501)])

    assert many[:-1] == one[:-1]
    assert "INTO points_checkpoints" in many[-1]
    assert "INTO points_checkpoints" not in one[-1]


# Pages, while entries arrive.


@pytest.mark.parametrize("after_ms", [9_999, 5, -5])
async def test_pages_show_each_earlier_entry_once_while_entries_arrive(
    client: Client, shop: Shop, after_ms: int
) -> None:
    """The new entries are newer than the others, between them, or older."""
    await apply_batch(client, *(increase(shop, n * 10, 1, n + 1) for n in range(10)))
    ids = await list_event_ids(client, shop)

    found: list[str] = []
    token = ""
    for number in range(20):
        page = await client.points.ListPointsEntries(list_request(shop, page_size=2, page_token=token))
        found += [entry.update.event_id for entry in page.entries]
        token = page.next_page_token
        if not token:
            break
        await client.apply(increase(shop, after_ms + number * 10, 0, None))

    assert [event_id for event_id in found if event_id in ids] == ids
    assert len(set(found)) == len(found)


async def test_a_page_continues_after_its_last_entry_even_if_its_ordinal_changes(client: Client, shop: Shop) -> None:
    """A late event of the same millisecond changes the ordinals."""
    await apply_batch(client, *(increase(shop, 0, 1, n + 1) for n in range(4)))
    ids = await list_event_ids(client, shop)
    page = await client.points.ListPointsEntries(list_request(shop, page_size=2))
    late = increase(shop, 0, 1, None)
    await client.apply(late)

    rest = await list_event_ids(client, shop, page_token=page.next_page_token)

    assert rest == [*ids[2:], late.event_id]


# Drift.


async def test_drifting_accounts_are_listed_until_the_missing_event_arrives(client: Client, shop: Shop) -> None:
    await apply_batch(
        client, increase(shop, 0, 20, 20), increase(shop, 20, 5, 55), increase(shop, 0, 1, 1, buyer_id="no-drift")
    )

    (account,) = (await drifting(client, shop)).accounts

    assert (account.buyer_id, account.drift, account.points_balance, account.active_points) == ("buyer", 30, 55, 55)
    assert account.as_of == at(NOW_MS)
    assert not account.lots
    await client.apply(increase(shop, 10, 30, 50))
    assert not (await drifting(client, shop)).accounts


async def test_drifting_accounts_are_listed_in_pages(client: Client, shop: Shop) -> None:
    """By store and buyer; a page token is valid for its own list only."""
    other_store = f"{shop.store_id}-2"
    await client.put_store(shop.merchant_id, other_store)
    accounts = [(store_id, f"buyer-{number}") for store_id in (shop.store_id, other_store) for number in range(3)]
    for store_id, name in accounts:
        await apply_batch(
            client,
            increase(shop, 0, 20, 20, store_id=store_id, buyer_id=name),
            decrease(shop, 20, 5, 10, store_id=store_id, buyer_id=name),
        )

    found: list[tuple[str, str]] = []
    tokens = [""]
    while len(tokens) == 1 or tokens[-1]:
        page = await drifting(client, shop, page_size=2, page_token=tokens[-1])
        found += [(account.store_id, account.buyer_id) for account in page.accounts]
        tokens.append(page.next_page_token)

    assert found == accounts
    assert len(tokens) == 4
    of_store = await drifting(client, shop, store_id=other_store, page_size=3)
    assert [(account.store_id, account.buyer_id) for account in of_store.accounts] == accounts[3:]
    assert not of_store.next_page_token
    refusal = await refused(drifting(client, shop, store_id=other_store, page_token=tokens[1]))
    assert set(refusal.fields) == {"page_token"}


async def test_a_wrong_request_for_drifting_accounts_names_all_wrong_fields(client: Client) -> None:
    request = points_pb2.ListDriftingAccountsRequest(store_id="a store", page_size=1_001, page_token="x")

    refusal = await refused(client.points.ListDriftingAccounts(request))

    assert set(refusal.fields) == {"merchant_id", "store_id", "page_size", "page_token"}


async def test_drifting_accounts_of_other_merchants_are_not_listed(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await apply_batch(client, increase(other, 0, 20, 20), increase(other, 20, 5, 55))

    assert not (await drifting(client, shop)).accounts
    assert len((await drifting(client, other)).accounts) == 1
    assert len(await list_entries(client, other)) == 2
