"""`pointbook quarantine` on a real server."""

import asyncio
import json
import os
import pty
from typing import Any

import pytest

from pointbook.v1 import webhooks_pb2
from pointbook_cli.terminal import escape_unprintable
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import Scope
from support.clients import Client
from support.clocks import NOW_MS, at
from support.processes import POINTBOOK, Finished, clean_environment, one_line, pointbook, without_request_ids
from support.servers import Service
from support.shims import points_body
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

TOPIC = "app_memberSystem_points/challenged"
TOPIC_MISSING = webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING
STORE_UNKNOWN = webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
MALFORMED = webhooks_pb2.QUARANTINE_REASON_MALFORMED
STORE_NOT_FOUND = (
    "refused  NOT_FOUND: STORE_NOT_FOUND: The merchant has no such store; register it with ProgramsService.PutStore. "
    "(request …)"
)


def settings_of(service: Service, token: str) -> dict[str, str]:
    """Return the environment of an operator with another token."""
    return {"GRPC_ADDRESS": f"127.0.0.1:{service.server.port}", "TOKEN": token}


async def quarantine_webhook(client: Client, merchant_id: str, raw_body: bytes, **changes: Any) -> str:
    """Quarantine a webhook, and return its id."""
    values: dict[str, Any] = {
        "merchant_id": merchant_id,
        "topic": TOPIC,
        "headers": [
            webhooks_pb2.WebhookHeader(name="x-shopline-merchant-id", value=merchant_id),
            webhooks_pb2.WebhookHeader(name="x-shopline-webhook-id", value="\x1b[2Jred\x9b31m"),
        ],
        "body": raw_body,
        "reason": STORE_UNKNOWN,
        "detail": "store_id must be registered",
    }
    request = webhooks_pb2.QuarantineWebhookRequest(**(values | changes))
    return (await client.webhooks.QuarantineWebhook(request)).quarantine_id


async def test_list_prints_one_line_per_webhook(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    merchant = ("--merchant", shop.merchant_id)
    first = await quarantine_webhook(
        client, shop.merchant_id, b"1 of " + shop.store_id.encode(), receive_time=at(NOW_MS - 65_000)
    )
    await quarantine_webhook(
        client, shop.merchant_id, b"1 of " + shop.store_id.encode(), receive_time=at(NOW_MS - 4_000)
    )
    second = await quarantine_webhook(client, shop.merchant_id, b"2", reason=MALFORMED, topic="customers/update")

    whole = await pointbook("quarantine", "list", *merchant, **settings)
    limited = await pointbook("quarantine", "list", *merchant, "--limit", "1", **settings)
    reason = await pointbook("quarantine", "list", *merchant, "--reason", "MALFORMED", **settings)
    topic = await pointbook("quarantine", "list", *merchant, "--topic", TOPIC, **settings)
    late = await pointbook("quarantine", "list", *merchant, "--since", "2026-06-01", **settings)
    none = await pointbook("quarantine", "list", *merchant, "--state", "REPLAYED", **settings)

    lines = whole.out.splitlines()
    assert [line.split()[0] for line in lines] == [first, second]
    assert lines[0] == (
        f"{first}  {at(NOW_MS - 65_000).ToJsonString()} x2  STORE_UNKNOWN  {TOPIC}  store_id must be registered"
    )
    assert (limited.out, limited.err) == (f"{lines[0]}\n", "There are more than 1; see --limit.\n")
    assert reason.out == f"{lines[1]}\n"
    assert topic.out == f"{lines[0]}\n"
    assert late == none == Finished(0, "", "")


async def test_list_reads_all_pages(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    ids = await asyncio.gather(
        *(
            quarantine_webhook(client, shop.merchant_id, b"%d of %s" % (number, shop.store_id.encode()))
            for number in range(600)
        )
    )
    finished = await pointbook("quarantine", "list", "--merchant", shop.merchant_id, **settings)

    assert {line.split()[0] for line in finished.out.splitlines()} == set(ids)


async def test_show_is_safe_for_a_terminal(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    raw_body = b'{"name": "caf\xc3\xa9",\n "no": "\xff\x1b]0;title\x07\xe2\x80\xaetxt\r"}'
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, raw_body)
    finished = await pointbook("quarantine", "show", quarantine_id, "--merchant", shop.merchant_id, **settings)

    assert finished.exit_code == 0, finished
    assert finished.out.startswith(f"{quarantine_id}  ")
    assert f"merchant: {shop.merchant_id}\nstate: QUARANTINED\n" in finished.out
    assert f"body: {len(raw_body)} bytes\n" in finished.out
    assert "x-shopline-webhook-id: \\x1b[2Jred\\x9b31m\n" in finished.out
    assert finished.out.endswith('{"name": "café",\n "no": "\\xff\\x1b]0;title\\x07\\u202etxt\\r"}\n')


async def test_replay_succeeds_once_the_store_is_registered(client: Client, settings: dict[str, str]) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    merchant = ("--merchant", shop.merchant_id)
    ids = [
        await quarantine_webhook(
            client, shop.merchant_id, points_body(shop, buyer_id=buyer), receive_time=at(NOW_MS - 9_000 + number)
        )
        for number, buyer in enumerate(("a", "b"))
    ]

    early = await pointbook("quarantine", "replay", "--all", *merchant, **settings)
    await client.put_store(shop.merchant_id, shop.store_id)
    broken = await quarantine_webhook(client, shop.merchant_id, b"no JSON", receive_time=at(NOW_MS - 8_500))
    late = await pointbook("quarantine", "replay", "--all", *merchant, **settings)
    again = await pointbook("quarantine", "replay", *ids, *merchant, **settings)

    assert (early.exit_code, early.err) == (1, "")
    assert without_request_ids(early.out).splitlines() == [
        f"{ids[0]}  {STORE_NOT_FOUND}",
        f"{ids[1]}  {STORE_NOT_FOUND}",
        "0 replayed, 2 still refused.",
    ]
    assert (late.exit_code, late.err) == (1, "")
    assert late.out.splitlines() == [
        f"{ids[0]}  APPLIED",
        f"{ids[1]}  APPLIED",
        f"{broken}  refused  body must be JSON in UTF-8",
        "2 replayed, 1 still refused.",
    ]
    assert again == Finished(0, f"{ids[0]}  DUPLICATE\n{ids[1]}  DUPLICATE\n2 replayed, 0 still refused.\n", "")
    assert (await client.account(shop.merchant_id, shop.store_id, "a")).points_balance == 20


@pytest.mark.parametrize("names_one", [True, False])
async def test_as_merchant_corrects_a_wrong_or_missing_merchant(
    client: Client, shop: Shop, settings: dict[str, str], *, names_one: bool
) -> None:
    named = unique("merchant") if names_one else ""
    quarantine_id = await quarantine_webhook(client, named, points_body(shop, buyer_id=unique("buyer")))
    merchant = ("--merchant", named) if named else ()

    refused = await pointbook("quarantine", "replay", quarantine_id, *merchant, **settings)
    replayed = await pointbook(
        "quarantine", "replay", quarantine_id, *merchant, "--as-merchant", shop.merchant_id, **settings
    )

    assert refused.exit_code == 1
    assert replayed == Finished(0, f"{quarantine_id}  APPLIED\n1 replayed, 0 still refused.\n", "")


@pytest.mark.parametrize("reason", ["ENDPOINT_MISMATCH", "TOO_OLD"])
async def test_suspicious_webhooks_are_replayed_only_by_id_or_reason(
    client: Client, shop: Shop, settings: dict[str, str], reason: str
) -> None:
    merchant = ("--merchant", shop.merchant_id)
    value = webhooks_pb2.QuarantineReason.Value(f"QUARANTINE_REASON_{reason}")
    doubtful = await quarantine_webhook(client, shop.merchant_id, points_body(shop, buyer_id="a"), reason=value)
    other = await quarantine_webhook(client, shop.merchant_id, points_body(shop, buyer_id="b"))

    rest = await pointbook("quarantine", "replay", "--all", *merchant, **settings)
    named = await pointbook("quarantine", "replay", "--all", "--reason", reason, *merchant, **settings)

    assert rest == Finished(0, f"{other}  APPLIED\n1 replayed, 0 still refused.\n", "")
    assert named == Finished(0, f"{doubtful}  APPLIED\n1 replayed, 0 still refused.\n", "")


async def test_customer_webhooks_are_replayed(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    merchant = ("--merchant", shop.merchant_id)
    headers = [
        webhooks_pb2.WebhookHeader(name="x-shopline-merchant-id", value=shop.merchant_id),
        webhooks_pb2.WebhookHeader(name="x-shopline-shop-id", value=shop.store_id),
    ]
    customer_body = b'{"id": "17", "email": "ada@example.com", "updated_at": "2026-05-01T08:00:00+08:00"}'
    erased = json.dumps(
        {"customer": {"id": "18"}, "shop_id": shop.store_id, "update_time": "2026-05-01T08:00:00+08:00"}
    ).encode()
    person = await quarantine_webhook(
        client,
        shop.merchant_id,
        customer_body,
        topic="customers/update",
        headers=headers,
        receive_time=at(NOW_MS - 9_000),
    )
    gone = await quarantine_webhook(
        client, shop.merchant_id, erased, topic="customers/redact", headers=headers, receive_time=at(NOW_MS - 8_000)
    )
    order = await quarantine_webhook(
        client, shop.merchant_id, b"{}", topic="orders/edited", receive_time=at(NOW_MS - 7_000)
    )
    points = await quarantine_webhook(client, shop.merchant_id, points_body(shop))
    finished = await pointbook("quarantine", "replay", "--all", *merchant, **settings)

    assert finished.exit_code == 1
    assert finished.out.splitlines() == [
        f"{person}  APPLIED",
        f"{gone}  APPLIED",
        f"{order}  refused  the topic orders/edited is not supported",
        f"{points}  APPLIED",
        "3 replayed, 1 still refused.",
    ]
    again = await pointbook("quarantine", "replay", person, *merchant, **settings)
    assert again == Finished(0, f"{person}  DUPLICATE\n1 replayed, 0 still refused.\n", "")
    no_body = await pointbook("quarantine", "replay", gone, *merchant, **settings)
    assert no_body.out.startswith(f"{gone}  refused  its body was erased with its customer")


async def test_a_body_with_a_byte_order_mark_is_replayed(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    marked = b"\xef\xbb\xbf" + points_body(shop)
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, marked, reason=MALFORMED)
    finished = await pointbook("quarantine", "replay", quarantine_id, "--merchant", shop.merchant_id, **settings)

    assert finished == Finished(0, f"{quarantine_id}  APPLIED\n1 replayed, 0 still refused.\n", "")
    assert (await client.account(shop.merchant_id, shop.store_id, "2404721679")).points_balance == 20


async def test_as_topic_sets_the_topic_of_webhooks_without_one(
    client: Client, shop: Shop, settings: dict[str, str]
) -> None:
    merchant = ("--merchant", shop.merchant_id)
    topicless = await quarantine_webhook(
        client, shop.merchant_id, points_body(shop), topic="", reason=TOPIC_MISSING, receive_time=at(NOW_MS - 2_000)
    )
    other = await quarantine_webhook(
        client, shop.merchant_id, points_body(shop, buyer_id="b"), receive_time=at(NOW_MS - 1_000)
    )

    listed = await pointbook("quarantine", "list", *merchant, "--reason", "TOPIC_MISSING", **settings)
    unnamed = await pointbook("quarantine", "replay", topicless, *merchant, **settings)
    wrong = await pointbook("quarantine", "replay", topicless, *merchant, "--as-topic", "customers/update", **settings)
    unknown = await pointbook("quarantine", "replay", topicless, *merchant, "--as-topic", "orders/edited", **settings)
    named = await pointbook("quarantine", "replay", "--all", *merchant, "--as-topic", TOPIC, **settings)

    assert " TOPIC_MISSING  (none)  " in listed.out
    assert unnamed.out.startswith(f"{topicless}  refused  it names no topic; set one with --as-topic\n")
    assert (wrong.exit_code, wrong.out.split("  ")[1]) == (1, "refused")
    assert one_line(unknown).startswith("--as-topic must be one of app_memberSystem_points/challenged, customers/")
    assert named == Finished(0, f"{topicless}  APPLIED\n{other}  APPLIED\n2 replayed, 0 still refused.\n", "")


async def test_drop_needs_a_reason_and_the_scope_admin(
    client: Client, service: Service, shop: Shop, settings: dict[str, str]
) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, b"x")
    merchant = ("--merchant", shop.merchant_id)
    limited = settings_of(service, await make_token(service.database_url, [shop.merchant_id], [Scope.WEBHOOKS]))
    reason = ("--reason", "a forged copy")

    assert (await pointbook("quarantine", "drop", quarantine_id, *merchant, **settings)).exit_code == 2
    denied = one_line(await pointbook("quarantine", "drop", quarantine_id, *reason, *merchant, **limited))
    dropped = await pointbook("quarantine", "drop", quarantine_id, *reason, *merchant, **settings)
    gone = one_line(await pointbook("quarantine", "show", quarantine_id, *merchant, **settings))

    assert without_request_ids(denied) == (
        "PERMISSION_DENIED: SCOPE_MISSING: The token lacks the scope admin. (request …)"
    )
    assert dropped == Finished(0, f"Webhook {quarantine_id} is dropped.\n", "")
    assert without_request_ids(gone) == (
        "NOT_FOUND: WEBHOOK_NOT_FOUND: No such webhook is in the merchant's quarantine. (request …)"
    )


async def test_errors_of_operators_are_reported_in_one_line(settings: dict[str, str]) -> None:
    away = await pointbook("quarantine", "list", "--server", f"127.0.0.1:{free_port()}")
    replay_away = await pointbook("quarantine", "replay", "q-1", "--server", f"127.0.0.1:{free_port()}")
    no_token = await pointbook("quarantine", "list", GRPC_ADDRESS=settings["GRPC_ADDRESS"])
    beyond = await pointbook("quarantine", "list", "--server", "db.internal:50051", TOKEN="t")
    wrong = await pointbook("quarantine", "list", "--reason", "WHATEVER", **settings)
    neither = await pointbook("quarantine", "replay", **settings)
    both = await pointbook("quarantine", "replay", "q-1", "--all", **settings)
    one = await pointbook("quarantine", "replay", "q-1", "--reason", "TOO_OLD", **settings)
    field = await pointbook("quarantine", "show", "two words", **settings)

    assert one_line(away).startswith("UNAVAILABLE: ")
    assert one_line(replay_away).startswith("UNAVAILABLE: ")
    assert one_line(no_token).startswith("UNAUTHENTICATED: TOKEN_MISSING: ")
    assert "POINTBOOK_ALLOW_PLAINTEXT" in one_line(beyond)
    assert one_line(wrong).startswith("--reason must be one of MALFORMED, ")
    assert one_line(neither) == one_line(both) == "name the webhooks to replay, or use --all"
    assert one_line(one) == "--reason requires --all"
    assert "(quarantine_id: must be " in one_line(field)


async def test_a_terminal_sees_a_progress_bar(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, points_body(shop))
    master, slave = pty.openpty()
    environment = clean_environment(settings) | {"TERM": "xterm", "COLUMNS": "120"}
    command = (POINTBOOK, "quarantine", "replay", "--all", "--merchant", shop.merchant_id)
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        written = b""
        loop = asyncio.get_running_loop()
        while chunk := await loop.run_in_executor(None, read, master):
            written += chunk
        assert await process.wait() == 0
    finally:
        os.close(master)

    assert b"Replaying" in written
    assert f"{quarantine_id}  APPLIED".encode() in written
    assert b"1 replayed, 0 still refused." in written


def read(master: int) -> bytes:
    """Read from a terminal; its end is an error on Linux."""
    try:
        return os.read(master, 65_536)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 語 and é", "plain text, 語 and é"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("a\tb\rc\nd", "a\\tb\\rc\\nd"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_escape_unprintable_keeps_letters_and_escapes_control_characters(text: str, shown: str) -> None:
    assert escape_unprintable(text) == shown
