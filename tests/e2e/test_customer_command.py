"""`pointbook customer show` on a real server."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from pointbook.v1 import redemption_pb2
from pointbook_cli.command_line import parse_time_zone
from pointbook_cli.customer_view import (
    CustomerQuery,
    CustomerView,
    guess_kind,
    parse_since_ms,
    read_view,
    to_json,
)
from pointbook_cli.main import app
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import Scope
from pointbook_server.rpc.request_fields import TIME_MS_MAX
from shopline_shim.settings import ShimSettings
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code
from support.processes import POINTBOOK, Finished, clean_environment, finish, pointbook
from support.redemption import booking, customer_ref, earn, redeem, redeem_request, reverse
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token

MOBILE = "+8613812345678"


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop with a customer who has every kind of timeline entry, a minute apart."""
    client, clock = service.client, service.clock
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await client.put_customer(
        shop.merchant_id,
        "c-1",
        mobile=MOBILE,
        email="bea@example.com",
        external_id="x-1",
        card_numbers=["2404721679"],
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}],
    )
    await earn(client, shop, 500, points_expiry_time=at(NOW_MS + 30 * DAY_MS))
    _, code = await issue_and_read_code(service, shop)
    clock.move(60)
    assert not await guess_code(client, shop, WRONG_CODE)
    clock.move(60)
    made = await redeem(client, redeem_request(shop, 100, validation_code=code, external_reference_number="order-1"))
    clock.move(60)
    await reverse(client, made, 30, external_reference_number="return-1")
    clock.move(60)
    await client.apply(booking(shop, 70, 430, after_ms=clock.now_ms - NOW_MS))
    clock.move(60)
    await refused(redeem(client, redeem_request(shop, 999, external_reference_number="order-2")))
    yield shop
    clock.now_ms = NOW_MS


async def show(shop: Shop, settings: dict[str, str], identifier: str, *options: str) -> Finished:
    """Run the command for a customer of a shop."""
    return await pointbook("customer", "show", identifier, "--merchant", shop.merchant_id, *options, **settings)


async def read(shop: Shop, settings: dict[str, str], identifier: str, kind: str, **changes: Any) -> CustomerView:
    """Read the view that the command would print."""
    view = await read_or_none(shop, settings, identifier, kind, **changes)
    assert view is not None
    return view


async def read_or_none(
    shop: Shop, settings: dict[str, str], identifier: str, kind: str, **changes: Any
) -> CustomerView | None:
    """Read the view that the command would print; None for an unknown customer."""
    shim_settings = ShimSettings(grpc_address=settings["GRPC_ADDRESS"], token=SecretStr(settings["TOKEN"]))
    return await asyncio.to_thread(
        read_view, shim_settings, CustomerQuery(shop.merchant_id, kind, identifier, **changes)
    )


async def test_a_customer_is_shown_with_points_and_a_timeline(shop: Shop, settings: dict[str, str]) -> None:
    environment = clean_environment(settings) | {"COLUMNS": "200"}
    command = ("customer", "show", MOBILE, "--merchant", shop.merchant_id)
    shown = await finish(POINTBOOK, *command, environment=environment)

    assert (shown.exit_code, shown.err) == (0, "Assuming --kind mobile.\n")
    lines = shown.out.splitlines()
    assert lines[:3] == [
        "Customer c-1",
        "  contacts: +86******5678 b***@example.com",
        f"Store {shop.store_id}, buyer buyer: balance 430, active 430, next to expire 430 at 2026-06-27 20:26:40",
    ]
    what = [re.split(r"\s{2,}", line)[1:3] for line in lines[lines.index("") + 2 :]]
    assert what == [
        ["redemption refused", "999"],
        ["taken", "-70"],
        ["reversed", "30"],
        ["redeemed", "100"],
        ["code used", "100"],
        ["code guessed", "100"],
        ["validation refused", "100"],
        ["code guessed", "100"],
        ["code sent", "100"],
        ["code requested", "100"],
        ["earned", "+500"],
    ]
    assert "803 INSUFFICIENT_POINTS (active_points 430, points 999)" in shown.out
    assert "order-2" in shown.out
    assert all(secret not in shown.out for secret in (MOBILE, "13812345678", "bea@", WRONG_CODE))


async def test_long_details_wrap_at_the_width_of_the_terminal(shop: Shop, settings: dict[str, str]) -> None:
    environment = clean_environment(settings) | {"COLUMNS": "90"}
    command = ("customer", "show", MOBILE, "--merchant", shop.merchant_id)
    shown = await finish(POINTBOOK, *command, environment=environment)
    timeline = shown.out[shown.out.index("\n\n") :]

    assert max(map(len, timeline.splitlines())) <= 90
    assert "INSUFFICIENT_POINTS(active_points430,points999)" in re.sub(r"\s", "", timeline)


async def test_json_is_one_document_with_stable_field_names(shop: Shop, settings: dict[str, str]) -> None:
    shown = await show(shop, settings, "x-1", "--kind", "external-id", "--json", "--program", "1")
    document = json.loads(shown.out)

    assert (shown.exit_code, shown.err) == (0, "")
    assert list(document) == [
        "merchant_id",
        "identifier",
        "customer",
        "contacts",
        "accounts",
        "program",
        "timeline",
        "truncated",
        "notes",
    ]
    assert document["identifier"] == {"kind": "external-id", "guessed": False}
    assert document["customer"]["customer"] == {"customer_id": "c-1"}
    assert document["accounts"] == [
        {
            "store_id": shop.store_id,
            "buyer_id": "buyer",
            "points_balance": 430,
            "active_points": 430,
            "held_points": 0,
            "expired_points": 0,
            "drift": 0,
            "next_expiry": {"points": 430, "time": "2026-06-27T20:26:40Z"},
        }
    ]
    assert document["program"]["active_points"] == 430
    newest = document["timeline"][0]
    assert (newest["kind"], newest["time"]) == ("refusal", "2026-05-28T20:31:40Z")
    assert newest["refusal"]["violations"][0]["metadata"] == {"points": "999", "active_points": "430"}
    assert newest["refusal"]["method"] == "REFUSED_METHOD_REDEEM_POINTS"
    assert [each["kind"] for each in document["timeline"]].count("validation_event") == 5
    assert (document["truncated"], document["contacts"]) == (False, None)


@pytest.mark.parametrize(
    ("identifier", "kind"),
    [
        ("+86 138 1234 5678", "mobile"),
        ("008613812345678", "mobile"),
        ("bea@example.com", "email"),
        (" 0086 138-1234-5678 ", "mobile"),
        ("\uff10\uff10\uff18\uff16138\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18", "mobile"),
        ("STORE/buyer", "buyer"),
        ("x-1", "external-id"),
        ("2404721679", "card-number"),
        ("c-1", "customer-id"),
    ],
)
async def test_every_kind_of_identifier_finds_the_customer(
    shop: Shop, settings: dict[str, str], identifier: str, kind: str
) -> None:
    view = await read(shop, settings, identifier.replace("STORE", shop.store_id), kind)
    assert view.customer.customer.customer_id == "c-1"
    assert len(view.entries) == 11


async def test_the_timeline_is_bounded_by_limit_and_since(shop: Shop, settings: dict[str, str]) -> None:
    few = await show(shop, settings, MOBILE, "--limit", "2")
    assert few.out.rstrip().endswith("These are the newest 2; --limit shows more.")
    for limit, count, is_truncated in ((3, 3, True), (10, 10, True), (11, 11, False), (500, 11, False)):
        view = await read(shop, settings, MOBILE, "mobile", limit=limit)
        assert (len(view.entries), view.is_truncated) == (count, is_truncated)

    view = await read(shop, settings, MOBILE, "mobile", since_ms=NOW_MS + 3 * 60_000)
    assert [each.WhichOneof("entry") for each in view.entries] == ["refusal", "points_entry", "reversal"]
    nothing = await show(shop, settings, MOBILE, "--since", at(NOW_MS + 86_400_000).ToJsonString())
    assert nothing.out.rstrip().endswith("There are no events in this period.")


@pytest.mark.parametrize("columns", [40, 60])
async def test_a_narrow_terminal_folds_columns(shop: Shop, settings: dict[str, str], columns: int) -> None:
    environment = clean_environment(settings) | {"COLUMNS": str(columns)}
    shown = await finish(POINTBOOK, "customer", "show", MOBILE, "--merchant", shop.merchant_id, environment=environment)
    lines = shown.out[shown.out.index("\n\n") :].splitlines()

    assert max(map(len, lines)) <= columns
    assert "\u2026" not in shown.out
    assert {"SETTLED,", "details"} <= set(shown.out.split())


async def test_piped_output_has_one_line_per_entry(shop: Shop, settings: dict[str, str]) -> None:
    shown = await show(shop, settings, MOBILE)
    lines = shown.out.splitlines()
    timeline = lines[lines.index("") + 2 :]

    assert len(timeline) == 11
    assert [line for line in lines if line != line.rstrip()] == []
    assert "803 INSUFFICIENT_POINTS (active_points 430, points 999), program 1, active 430, order-2" in timeline[0]


@pytest.mark.parametrize(
    ("time_zone", "text"),
    [
        ("UTC", "9999-12-31 23:59:59"),
        ("America/Los_Angeles", "9999-12-31 15:59:59"),
        ("Asia/Shanghai", "9999-12-31 23:59:59 UTC"),
        ("Pacific/Kiritimati", "9999-12-31 23:59:59 UTC"),
    ],
)
async def test_points_that_expire_in_year_9999_are_shown(
    client: Client, shop: Shop, settings: dict[str, str], time_zone: str, text: str
) -> None:
    await earn(client, shop, 50, "forever", points_expiry_time=at(TIME_MS_MAX))
    shown = await show(shop, settings, f"{shop.store_id}/forever", "--time-zone", time_zone)

    assert shown.exit_code == 0
    assert f"next to expire 50 at {text}\n" in shown.out
    assert f"expire {text}" in shown.out.splitlines()[-1]


async def test_times_are_shown_in_the_requested_time_zone(shop: Shop, settings: dict[str, str]) -> None:
    zone = "Asia/Shanghai"
    environment = clean_environment(settings) | {"COLUMNS": "200"}
    command = ("customer", "show", MOBILE, "--merchant", shop.merchant_id, "--time-zone", zone)
    shown = await finish(POINTBOOK, *command, environment=environment)
    assert zone in shown.out
    assert "2026-05-29 04:31:40" in shown.out


async def test_contacts_in_full_need_an_option_and_the_scope_admin(
    service: Service, shop: Shop, settings: dict[str, str]
) -> None:
    whole = await show(shop, settings, MOBILE, "--contacts")
    assert "  mobile: +8613812345678\n  email: bea@example.com\n  external_id: x-1\n" in whole.out

    tokens = [
        await make_token(service.database_url, [shop.merchant_id], scopes)
        for scopes in ([Scope.SUPPORT, Scope.POINTS_READ], [Scope.SUPPORT])
    ]
    desk, only = (settings | {"TOKEN": token} for token in tokens)
    view = await read(shop, desk, MOBILE, "mobile")
    assert (len(view.accounts or ()), len(view.entries), view.notes) == (1, 11, [])
    with pytest.raises(OSError, match="SCOPE_MISSING"):
        await read(shop, desk, MOBILE, "mobile", contacts=True)
    view = await read(shop, only, MOBILE, "mobile")
    assert (view.accounts, len(view.entries), len(view.notes)) == (None, 11, 1)
    assert "points.read" in view.notes[0]


async def test_an_unknown_customer_is_exit_code_one(shop: Shop, settings: dict[str, str]) -> None:
    shown = await show(shop, settings, "unknown@example.com")
    assert (shown.exit_code, shown.out) == (1, "")
    assert shown.err.splitlines()[-1] == f"pointbook: merchant {shop.merchant_id} has no customer with this email"
    for kind in ("external-id", "card-number", "card-external-id", "customer-id"):
        assert await read_or_none(shop, settings, "unknown", kind) is None


@pytest.mark.parametrize(
    ("identifier", "options", "words"),
    [
        ("2404721679", (), "--kind"),
        ("ada", (), "--kind"),
        ("x", ("--kind", "phone"), "--kind must be one of mobile"),
        ("buyer", ("--kind", "buyer"), "STORE/BUYER"),
        (MOBILE, ("--since", "yesterday"), "--since"),
        (MOBILE, ("--since", "2026-02-30"), "--since"),
        (MOBILE, ("--since", "0001-01-01", "--time-zone", "Asia/Shanghai"), "--since"),
        (MOBILE, ("--since", "9" * 20), "--since"),
        (MOBILE, ("--time-zone", "Shanghai"), "--time-zone"),
    ],
)
def test_invalid_options_are_reported_in_one_line(identifier: str, options: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["customer", "show", identifier, "--merchant", "m", *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["0", "-1", "9223372036854775808"])
def test_an_invalid_program_id_is_exit_code_two(program: str) -> None:
    result = CliRunner().invoke(app, ["customer", "show", MOBILE, "--merchant", "m", "--program", program])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--program" in result.stderr


async def test_an_unavailable_server_is_exit_code_two(settings: dict[str, str]) -> None:
    away = settings | {"GRPC_ADDRESS": "127.0.0.1:1"}
    finished = await pointbook("customer", "show", "ada@example.com", "--merchant", "m", **away)
    assert finished.exit_code == 2
    assert "Traceback" not in finished.err


@pytest.mark.parametrize(
    ("identifier", "kind"),
    [
        ("+8613812345678", "mobile"),
        ("\u202a+86 (138) 1234-5678\u202c", "mobile"),
        ("\uff0b\uff18\uff16138\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18", "mobile"),
        ("0085291236001", "mobile"),
        ("ada@example.com", "email"),
        ("1718263946864/2404721679", "buyer"),
        ("c-0123456789abcdef01234567", "customer-id"),
        ("13812345678", ""),
        ("2404721679", ""),
        ("c-1", ""),
        ("+12", ""),
        ("/b", ""),
        ("", ""),
    ],
)
def test_the_kind_is_guessed_only_if_it_is_unambiguous(identifier: str, kind: str) -> None:
    assert guess_kind(identifier) == kind


@pytest.mark.parametrize(
    ("text", "since_ms"),
    [
        ("30d", NOW_MS - 30 * DAY_MS),
        ("90m", NOW_MS - 90 * 60_000),
        ("2026-05-01", 1_777_564_800_000),
        ("2026-05-01T00:00:00Z", 1_777_593_600_000),
        ("2026-05-01T00:00:00+08:00", 1_777_564_800_000),
        ("tomorrow", None),
        ("2026-13-01", None),
        ("30", 30),
        ("", None),
    ],
)
def test_since_is_a_duration_a_day_or_a_time(text: str, since_ms: int | None) -> None:
    assert parse_since_ms(text, NOW_MS, parse_time_zone("Asia/Shanghai")) == since_ms


async def test_a_buyer_without_a_customer_is_shown(client: Client, shop: Shop, settings: dict[str, str]) -> None:
    await earn(client, shop, 50, "unowned")
    request = redeem_request(shop, 10, customer=customer_ref(shop, "unowned"), notes="said \u202ered")
    made: Any = await redeem(client, request)
    assert made.state == redemption_pb2.REDEMPTION_STATE_PENDING
    shown = await show(shop, settings, f"{shop.store_id}/unowned")

    assert shown.exit_code == 0
    assert shown.out.startswith(f"Buyer unowned of store {shop.store_id}, no customer\n")
    assert "\u202e" not in shown.out
    document = await show(shop, settings, f"{shop.store_id}/unowned", "--json")
    assert "\u202e" not in document.out
    assert json.loads(document.out)["timeline"][0]["redemption"]["notes"] == "said \u202ered"


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b2J", "\x7f", "\u202e", "\u200b", "\U000e0041", "\n\t", "\u5361 \u00e9 \U0001f600"]
)
def test_json_escapes_characters_that_control_a_terminal(text: str) -> None:
    query = CustomerQuery("m", "email", "ada@example.com")
    view = CustomerView(redemption_pb2.TimelineCustomer(masked_email=text), [], is_truncated=False, accounts=[])
    document = to_json(view, query, is_guessed=False)

    assert document.replace("\n", "").isprintable()
    assert json.loads(document)["customer"]["masked_email"] == text
    assert (text in document) is text.isprintable()


@pytest.mark.parametrize("buyer_id", ["ada@example.com", "+85291236001", "a/b", "c-0123456789abcdef01234567"])
async def test_a_buyer_id_like_an_email_address_is_found_with_its_kind(
    client: Client, shop: Shop, settings: dict[str, str], buyer_id: str
) -> None:
    await earn(client, shop, 50, buyer_id)
    shown = await show(shop, settings, f"{shop.store_id}/{buyer_id}", "--kind", "buyer")
    assert shown.out.startswith(f"Buyer {buyer_id} of store {shop.store_id}, no customer\n")
