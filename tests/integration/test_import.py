"""Imports of files into a real ledger."""

import asyncio
import contextlib
import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from pydantic import SecretStr

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_cli import progress
from pointbook_cli.points_import import batch_sender
from pointbook_cli.points_import.importer import ImportOptions, run_import
from pointbook_cli.points_import.points_file import FORMATS, Format, PointsFileOptions
from shopline_shim.settings import ShimSettings
from support.clients import Client
from support.clocks import NOW_MS, at
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

Row = dict[str, object]
Imports = Callable[..., Any]


def change(number: int, buyer_id: str = "buyer", value: int = 10, **changes: object) -> Row:
    """Return a decrease or increase without a balance, seconds after the previous one."""
    return {
        "event_id": unique("event"),
        "buyer_id": buyer_id,
        "update_type": "INCREASE" if value >= 0 else "DECREASE",
        "updated_scene": "SUCCESSFUL_ORDERS" if value >= 0 else "CASHBACK",
        "updated_value": abs(value),
        "points_balance": None,
        "updated_at": NOW_MS - 10_000_000 + number * 1_000,
        **changes,
    }


def history(count: int, buyers: int = 5) -> list[Row]:
    """Return a consistent history of accounts: each event adds ten points."""
    return [change(n, f"buyer-{n % buyers}", points_balance=10 * (n // buyers + 1)) for n in range(count)]


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write lines in the format of the file's name."""
    rows = list(rows)
    if FORMATS[path.suffix] is Format.JSONL:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    return path


@pytest.fixture
def imports(service: Service, admin_token: str, shop: Shop) -> Imports:
    """A function that imports a file for the test's shop and returns the exit code."""

    async def run(file: Path, *, stop: asyncio.Event | None = None, **changes: Any) -> int:
        address = changes.pop("address", f"127.0.0.1:{service.server.port}")
        file_options = {"format": FORMATS[file.suffix], "merchant_id": shop.merchant_id, "store_id": shop.store_id}
        values: dict[str, Any] = {
            "file": file,
            "file_options": PointsFileOptions(**{**file_options, **changes.pop("file_options", {})}),
            "report": None,
            "server": address and ShimSettings(grpc_address=address, token=SecretStr(admin_token)),
            "batch_size": 7,
            "in_flight": 3,
        }
        return await run_import(ImportOptions(**{**values, **changes}), stop or asyncio.Event())

    return run


async def ledger_rows(service: Service, shop: Shop) -> list[tuple[object, ...]]:
    """Return all points data of a merchant."""
    connection = await asyncpg.connect(service.database_url)
    tables = ("points_accounts", "points_entries", "points_checkpoints")
    rows = []
    for table in tables:
        query = f"SELECT * FROM {table} WHERE merchant_id = $1 ORDER BY buyer_id, {table}::text"  # noqa: S608 - names of our tables
        rows += [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]
    await connection.close()
    return rows


async def balances(client: Client, shop: Shop, *buyers: str) -> list[tuple[int, int]]:
    """Return the balance and the drift of accounts."""
    accounts = [await client.account(shop.merchant_id, shop.store_id, buyer) for buyer in buyers]
    return [(account.points_balance, account.drift) for account in accounts]


@pytest.mark.parametrize("name", ["events.csv", "events.jsonl", "events.ndjson"])
async def test_a_file_is_imported_once(
    name: str,
    *,
    imports: Imports,
    client: Client,
    service: Service,
    shop: Shop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / name, history(100))

    first = await imports(file)
    output = capsys.readouterr().out
    before = await ledger_rows(service, shop)
    second = await imports(file)

    assert (first, second) == (0, 0)
    assert "100 lines" in output
    assert "0 duplicate, 0 refused" in output
    assert "0 applied, 0 late, 100 duplicate, 0 refused" in capsys.readouterr().out
    assert await ledger_rows(service, shop) == before
    assert await balances(client, shop, *(f"buyer-{n}" for n in range(5))) == [(200, 0)] * 5


async def test_lines_with_a_balance_may_come_in_any_order(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    file = write(tmp_path / "events.csv", reversed(history(60)))

    assert await imports(file, in_flight=4) == 0

    assert await balances(client, shop, *(f"buyer-{n}" for n in range(5))) == [(120, 0)] * 5


async def test_lines_without_a_balance_are_applied_in_their_order(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    file = write(tmp_path / "events.csv", [change(n, value=-10 if n % 2 else 10) for n in range(200)])

    assert await imports(file, in_flight=4, batch_size=3) == 0

    assert await balances(client, shop, "buyer") == [(0, 0)]


UNNAMED = [change(n, event_id="", value=value) for n, value in ((1, 30), (2, -20), (3, 5), (4, -15))]


@pytest.mark.parametrize("rows", [UNNAMED, UNNAMED[::-1], UNNAMED[2:] + UNNAMED[:2]])
async def test_lines_without_balance_and_id_may_come_in_any_order(
    rows: list[Row], imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    assert await imports(write(tmp_path / "events.csv", rows), batch_size=1, in_flight=4) == 0

    assert await balances(client, shop, "buyer") == [(0, 0)]


async def test_a_refusal_with_a_generated_id_is_not_stored(
    imports: Imports, client: Client, service: Service, shop: Shop, tmp_path: Path
) -> None:
    spent, earned = UNNAMED[1], UNNAMED[0]
    assert await imports(write(tmp_path / "spent.csv", [spent])) == 1
    assert await ledger_rows(service, shop) == []

    assert await imports(write(tmp_path / "earned.csv", [earned])) == 0
    assert await imports(write(tmp_path / "spent.csv", [spent])) == 0
    assert await balances(client, shop, "buyer") == [(10, 0)]


async def test_a_refusal_stored_by_an_earlier_release_is_deleted(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    file, report = write(tmp_path / "events.csv", UNNAMED[:2]), tmp_path / "report.jsonl"
    assert await imports(write(tmp_path / "spent.csv", [UNNAMED[1]]), report=report) == 1
    as_before = shop.update(
        event_id=json.loads(report.read_text())["event_id"],
        update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE,
        updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK,
        updated_value=20,
        points_balance=None,
        updated_at=at(int(str(UNNAMED[1]["updated_at"]))),
    )
    assert (await refused(client.apply(as_before))).reason == "INSUFFICIENT_POINTS"

    assert await imports(file) == 0
    assert await balances(client, shop, "buyer") == [(10, 0)]


async def test_a_refusal_with_an_id_of_the_file_is_stored(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    spent = change(2, value=-20)
    assert await imports(write(tmp_path / "spent.csv", [spent])) == 1
    assert await imports(write(tmp_path / "all.csv", [change(1, value=30), spent])) == 1

    assert await balances(client, shop, "buyer") == [(30, 0)]


async def test_the_report_is_in_the_order_of_the_file(imports: Imports, tmp_path: Path) -> None:
    wrong = [change(n, f"buyer-{n % 7}", value=-1, event_id="" if n % 2 else "e 1") for n in range(60)]
    report = tmp_path / "report.jsonl"

    assert await imports(write(tmp_path / "events.csv", wrong), report=report, batch_size=2, in_flight=4) == 1

    assert [json.loads(line)["line"] for line in report.read_text().splitlines()] == list(range(2, 62))


async def test_progress_shows_both_phases(
    imports: Imports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    file = write(tmp_path / "events.csv", history(10))

    assert await imports(file, in_flight=1) == 0
    output = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in output] == [
        "100%, reading",
        "100%, sorting",
        "60%, sending",
        "100%, sending",
    ]
    assert await imports(file, address=None) == 0
    assert "100%, checking: 10 lines" in capsys.readouterr().err


async def test_identical_lines_without_a_balance_all_count(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path
) -> None:
    file = write(tmp_path / "events.csv", [change(1, event_id="") for _ in range(3)])

    assert [await imports(file), await imports(file)] == [0, 0]

    assert await balances(client, shop, "buyer") == [(30, 0)]


async def test_every_refused_line_is_reported(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = unique("event")
    rows = [
        change(1, event_id=twice, points_balance=10),
        change(2, updated_value=-1),
        change(3, event_id=twice, points_balance=20),
        change(4, value=-1_000),
        change(5, store_id="no-such-store"),
        change(6, points_balance=20),
        change(7, colour="red"),
    ]
    report = tmp_path / "report.jsonl"

    assert await imports(write(tmp_path / "events.jsonl", rows), report=report) == 1

    output = {row["line"]: row for row in map(json.loads, report.read_text().splitlines())}
    assert {number: row["reason"] for number, row in output.items()} == {
        2: "INVALID_FIELDS",
        3: "EVENT_ID_REUSED",
        4: "INSUFFICIENT_POINTS",
        5: "STORE_NOT_FOUND",
        7: "INVALID_FIELDS",
    }
    assert output[3]["event_id"] == twice
    assert output[2]["violations"][0]["field"] == "updated_value"
    printed = capsys.readouterr().out
    assert all(f"line {number} " in printed for number in output)
    assert "2 applied, 0 late, 0 duplicate, 5 refused" in printed
    assert await balances(client, shop, "buyer") == [(20, 0)]


async def test_control_characters_of_a_line_are_escaped(
    imports: Imports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await imports(write(tmp_path / "events.jsonl", [change(1, event_id="\x1b[2Jgone")])) == 1

    printed = capsys.readouterr().out
    assert "\\x1b[2Jgone" in printed
    assert "\x1b" not in printed


async def test_only_the_first_refused_lines_are_printed(
    imports: Imports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.jsonl"
    file = write(tmp_path / "events.csv", [change(n, update_type="NEITHER") for n in range(50)])

    assert await imports(file, report=report) == 1

    printed = capsys.readouterr().out
    assert sum(line.startswith("line ") for line in printed.splitlines()) == 20
    assert "and 30 more refused lines" in printed
    assert len(report.read_text().splitlines()) == 50


async def test_a_dry_run_writes_nothing(
    imports: Imports, service: Service, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "events.csv", [*history(30), change(31, updated_value="many")])

    assert await imports(file, address=None) == 1

    output = capsys.readouterr().out.splitlines()
    assert "30 fine, 1 refused" in output[-2]
    assert "Only the server can check" in output[-1]
    for what in ("stores", "balances of existing accounts", "event ids of earlier imports", "tokens"):
        assert what in output[-1]
    assert await ledger_rows(service, shop) == []


async def test_a_dry_run_refuses_only_certain_errors(
    imports: Imports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = change(1, event_id="e-1", points_balance=10)
    rows = [twice, twice, change(2, event_id="e-1"), change(3, "other", -7), change(4, "1718263946864520000")]

    assert await imports(write(tmp_path / "events.csv", rows), address=None) == 1

    output = capsys.readouterr().out
    assert "line 4 (e-1): EVENT_ID_REUSED" in output
    assert "1 line repeats another line" in output
    assert "1 line takes more points than the file gives the account up to that time (the first is line 5)" in output
    assert "1 line has an id that ends in zeros after its 15th digit" in output
    assert "compare line 6 with the source" in output
    assert "4 fine, 1 refused" in output


async def test_opening_balances_open_accounts(
    imports: Imports, client: Client, service: Service, shop: Shop, tmp_path: Path
) -> None:
    rows = [
        {"buyer_id": "rich", "points_balance": 30, "points_expiry_time": "2027-01-01T00:00:00Z"},
        {"buyer_id": "poor", "points_balance": 0, "points_expiry_time": None},
        {"buyer_id": "indebted", "points_balance": -4, "points_expiry_time": None},
    ]
    file = write(tmp_path / "balances.csv", rows)
    file_options = {"opening_balances": True, "at_ms": NOW_MS - 60_000}

    codes = [await imports(file, file_options=file_options)]
    before = await ledger_rows(service, shop)
    codes.append(await imports(file, file_options=file_options))

    assert codes == [0, 0]
    assert await ledger_rows(service, shop) == before
    assert await balances(client, shop, "rich", "poor", "indebted") == [(30, 0), (0, 0), (-4, 0)]
    (lot,) = (await client.account(shop.merchant_id, shop.store_id, "rich")).lots
    assert (lot.remaining_points, lot.points_expiry_time.ToMilliseconds()) == (30, 1_798_761_600_000)


async def test_a_second_opening_balance_at_the_same_time_is_refused(
    imports: Imports, client: Client, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"buyer_id": "buyer", "points_balance": balance} for balance in (30, 31)]
    file_options = {"opening_balances": True, "at_ms": NOW_MS - 60_000}

    assert await imports(write(tmp_path / "balances.csv", rows), file_options=file_options) == 1

    assert "line 3" in capsys.readouterr().out
    assert await balances(client, shop, "buyer") == [(30, 0)]


class Flaky(points_pb2_grpc.PointsServiceServicer):
    """A server that fails first: whole calls, or every second item."""

    def __init__(self, client: Client) -> None:
        self.calls: list[grpc.StatusCode] = []
        self.items: list[grpc.StatusCode] = []
        self.hangs = False
        self._client = client

    async def BatchApplyPointsUpdates(  # noqa: N802 - gRPC names it
        self, request: points_pb2.BatchApplyPointsUpdatesRequest, context: Any
    ) -> points_pb2.BatchApplyPointsUpdatesResponse:
        """Return errors while there are some, then forward the call."""
        if self.hangs:
            await asyncio.sleep(60)
        if self.calls:
            await context.abort(self.calls.pop(), "in trouble")
        if not self.items:
            return await self._client.points.BatchApplyPointsUpdates(request)
        error = points_pb2.UpdateError(code=self.items.pop().value[0], reason="TRANSACTION_CONFLICT", message="later")
        forwarded = points_pb2.BatchApplyPointsUpdatesRequest(updates=request.updates[::2])
        results = list((await self._client.points.BatchApplyPointsUpdates(forwarded)).results)
        results = [
            points_pb2.PointsUpdateResult(error=error) if n % 2 else results[n // 2]
            for n in range(len(request.updates))
        ]
        return points_pb2.BatchApplyPointsUpdatesResponse(results=results)


@pytest.fixture
async def flaky(client: Client) -> AsyncIterator[tuple[Flaky, str]]:
    """A flaky server and its address."""
    servicer = Flaky(client)
    server = grpc.aio.server()
    points_pb2_grpc.add_PointsServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


RETRIED = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
]


async def test_retriable_errors_are_retried(
    imports: Imports, client: Client, shop: Shop, flaky: tuple[Flaky, str], tmp_path: Path
) -> None:
    servicer, address = flaky
    servicer.calls, servicer.items = [*RETRIED], [*RETRIED]
    report = tmp_path / "report.jsonl"

    assert await imports(write(tmp_path / "events.csv", history(60)), address=address, report=report) == 0

    assert (servicer.calls, servicer.items, report.read_text()) == ([], [], "")
    assert await balances(client, shop, *(f"buyer-{n}" for n in range(5))) == [(120, 0)] * 5


async def test_retries_end_after_a_maximum_time(
    imports: Imports, flaky: tuple[Flaky, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, address = flaky
    servicer.calls = [grpc.StatusCode.UNAVAILABLE] * 1_000
    monkeypatch.setattr(batch_sender, "RETRY_SECONDS", 1.0)

    with pytest.raises(OSError, match="errors for 1 seconds: UNAVAILABLE: in trouble"):
        await imports(write(tmp_path / "events.csv", history(10)), address=address)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL])
async def test_other_errors_end_the_import(
    code: grpc.StatusCode, imports: Imports, flaky: tuple[Flaky, str], tmp_path: Path
) -> None:
    servicer, address = flaky
    servicer.calls = [code]

    with pytest.raises(OSError, match=rf"refused the call: {code.name}: in trouble \(request \w+\); until then"):
        await imports(write(tmp_path / "events.csv", history(10)), address=address)


async def test_a_stopped_import_prints_its_progress(
    imports: Imports,
    flaky: tuple[Flaky, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    servicer, address = flaky
    servicer.hangs = True
    monkeypatch.setattr(batch_sender, "STOP_SECONDS", 0.2)
    stop = asyncio.Event()

    running = asyncio.create_task(imports(write(tmp_path / "events.csv", history(50)), address=address, stop=stop))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), 0.5)
    stop.set()

    assert await asyncio.wait_for(running, 5.0) == 130
    assert "Stopped." in capsys.readouterr().out


async def test_an_invalid_file_sends_nothing(imports: Imports, service: Service, shop: Shop, tmp_path: Path) -> None:
    file = write(tmp_path / "events.csv", [change(1, colour="red")])

    with pytest.raises(OSError, match="unknown columns: 'colour'"):
        await imports(file)

    assert await ledger_rows(service, shop) == []


async def test_the_report_cannot_overwrite_the_file(imports: Imports, tmp_path: Path) -> None:
    file = write(tmp_path / "events.csv", history(3))

    with pytest.raises(OSError, match="--report"):
        await imports(file, report=file)

    assert len(file.read_text().splitlines()) == 4
