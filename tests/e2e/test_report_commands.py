"""`pointbook report` on a real database."""

import csv
import io
import sys
from pathlib import Path

import pytest

from support.clients import Client
from support.clocks import at
from support.codes import CODE_SETTINGS, guess_code, issue_and_read_code
from support.processes import POINTBOOK, clean_environment, finish, one_line, pointbook
from support.redemption import earn, redeem, redeem_request
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

FORMULA = "=HYPERLINK(A1)"
YEAR_2100_MS = 4_102_444_800_000


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop with points, a redemption and a code, whose program has a dangerous name."""
    client = service.client
    program = {"criteria": {}, "validation": CODE_SETTINGS, "display_name": FORMULA, "time_zone": "Asia/Shanghai"}
    await client.put_program(shop.merchant_id, shop.store_id, **program)
    buyers = [{"store_id": shop.store_id, "buyer_id": "buyer"}]
    await client.put_customer(shop.merchant_id, "c-1", mobile="+8613812345678", buyers=buyers)
    await earn(client, shop, 1_500, points_expiry_time=at(YEAR_2100_MS))
    await client.apply(shop.update("poor", updated_value=5, points_balance=-7))
    await redeem(client, redeem_request(shop, 30))
    _, code = await issue_and_read_code(service, shop)
    assert await guess_code(client, shop, code)
    return shop


async def report(service: Service, kind: str, *options: str) -> list[list[str]]:
    """Return the rows of a report in CSV, without the header."""
    finished = await pointbook("report", kind, *options, "--csv", DATABASE_URL=service.database_url)
    assert (finished.exit_code, finished.err) == (0, ""), finished
    return list(csv.reader(io.StringIO(finished.out)))[1:]


async def test_points_as_csv_are_plain_numbers(service: Service, shop: Shop) -> None:
    rows = await report(service, "points", "--merchant", shop.merchant_id)

    assert ["now", "balance", "", "1493", "", "2"] in rows
    assert [row[:4] for row in rows if row[1] == "outstanding"] == [["now", "outstanding", "2100-01", "1500"]]
    assert ["now", "negative balances", "", "-7", "", "1"] in rows
    assert ["period", "balance at the end", "", "1493", "", ""] in rows
    assert await report(service, "points", "--merchant", shop.merchant_id, "--store", shop.store_id) == rows


async def test_the_months_are_those_of_the_programs_or_of_the_option(service: Service, shop: Shop) -> None:
    rows = await report(service, "points", "--merchant", shop.merchant_id, "--time-zone", "America/New_York")

    assert [row[2] for row in rows if row[1] == "outstanding"] == ["2099-12"]


async def test_a_period_has_its_first_and_last_day(service: Service, shop: Shop) -> None:
    merchant = ("--merchant", shop.merchant_id)
    inside = await report(service, "points", *merchant, "--from", "2026-05-01", "--to", "2026-05-31")
    outside = await report(service, "points", *merchant, "--from", "2026-06-01")

    assert ["period", "earned", "", "1505", "", ""] in inside
    assert ["period", "earned", "", "0", "", ""] in outside
    assert ["period", "balance at the start", "", "1493", "", ""] in outside


@pytest.mark.parametrize("what", ["points", "redemptions", "codes"])
async def test_a_period_may_be_the_whole_calendar(service: Service, shop: Shop, what: str) -> None:
    days = ("--from", "0001-01-01", "--to", "9999-12-31")
    merchant = ("--merchant", shop.merchant_id)

    assert await report(service, what, *merchant, *days) == await report(service, what, *merchant)


async def test_a_text_that_is_a_formula_is_defused(service: Service, shop: Shop) -> None:
    (row,) = await report(service, "redemptions", "--merchant", shop.merchant_id)

    assert row[:3] == ["1", f"'{FORMULA}", "2026-05"]
    assert row[4:8] == ["1", "30", "0.30", "USD"]


async def test_csv_is_utf_8_in_every_locale(service: Service, shop: Shop) -> None:
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, display_name="積分")
    environment = clean_environment({"DATABASE_URL": service.database_url}) | {"PYTHONIOENCODING": "latin-1"}
    command = (sys.executable, POINTBOOK, "report", "redemptions", "--merchant", shop.merchant_id, "--csv")
    finished = await finish(*command, environment=environment)

    assert (finished.exit_code, finished.err) == (0, "")
    assert finished.out.splitlines()[1].startswith("1,積分,")


async def test_codes_are_reported_by_day_and_outcome(service: Service, shop: Shop, tmp_path: Path) -> None:
    options = ("report", "codes", "--merchant", shop.merchant_id, "--output", tmp_path / "codes.csv")
    finished = await pointbook(*options, DATABASE_URL=service.database_url)

    assert (finished.exit_code, finished.out) == (0, "")
    assert (tmp_path / "codes.csv").read_text().splitlines() == [
        "day,action,channel,outcome,events",
        "2026-05-28,ISSUE,SMS,OPENED,1",
        "2026-05-28,DELIVER,SMS,SENT,1",
        "2026-05-28,GUESS,SMS,RIGHT,1",
    ]


async def test_reports_are_tables_on_a_terminal(service: Service, shop: Shop) -> None:
    merchant = ("--merchant", shop.merchant_id)
    points = await pointbook("report", "points", *merchant, DATABASE_URL=service.database_url)
    codes = await pointbook("report", "codes", *merchant, "--to", "2020-01-01", DATABASE_URL=service.database_url)

    lines = points.out.splitlines()
    assert lines[0].split() == ["when", "figure", "expiry_month", "points", "unheld_points", "accounts"]
    assert lines[1].split() == ["now", "balance", "1,493", "2"]
    assert lines[-1] == "Months and days of Asia/Shanghai."
    assert codes.out == "There is nothing to report.\n"


async def test_what_cannot_be_reported_is_named_in_one_line(client: Client, service: Service, shop: Shop) -> None:
    async def error(*options: str) -> str:
        return one_line(await pointbook("report", "points", *options, DATABASE_URL=service.database_url))

    merchant = ("--merchant", shop.merchant_id)
    assert await error("--merchant", "unknown") == "no store is registered for the merchant unknown"
    assert await error(*merchant, "--store", "nowhere") == f"the merchant {shop.merchant_id} has no store nowhere"
    assert await error(*merchant, "--from", "2026-02-01", "--to", "2026-01-31") == "--to is before --from"
    assert (await error(*merchant, "--time-zone", "Mars")).startswith("--time-zone must be an IANA time zone")
    second = Shop(shop.merchant_id, unique("store"))
    await client.put_store(second.merchant_id, second.store_id)
    await client.put_program(second.merchant_id, second.store_id, program_id=2)
    assert "choose one by --time-zone, such as Asia/Shanghai, UTC" in await error(*merchant)
    assert await report(service, "points", *merchant, "--store", second.store_id)
