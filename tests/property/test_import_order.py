"""Imports do not depend on the order of a file's lines."""

import asyncio
import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from pointbook_cli.points_import.importer import ImportOptions, run_import
from pointbook_cli.points_import.points_file import Format, PointsFileOptions
from shopline_shim.settings import ShimSettings
from support.clients import Client
from support.clocks import NOW_MS
from support.examples import examples
from support.ledger import check_ledger
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

COLUMNS = ("event_id", "buyer_id", "update_type", "updated_scene", "updated_value", "points_balance", "updated_at")
START_MS = NOW_MS - 1_000_000
TABLES = ("points_accounts", "points_entries", "points_checkpoints")
VARYING = {"received_at_ms", "revision"}
"""Columns that depend on when and in how many steps a row was written."""
SETTINGS = settings(
    max_examples=examples(12),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Row = tuple[str, ...]


def row(
    event_id: str = "",
    buyer: str = "a",
    *,
    points: int = 1,
    balance: int | None = None,
    after_ms: int = 0,
    update_type: str = "",
) -> Row:
    """Build a line of a file."""
    update_type = update_type or ("INCREASE" if points >= 0 else "DECREASE")
    balance_text = "" if balance is None else str(balance)
    return (
        *(event_id, buyer, update_type, "LUCKY_DRAW"),
        *(str(abs(points)), balance_text, str(START_MS + after_ms)),
    )


rows = st.builds(
    row,
    event_id=st.sampled_from(["", "", "", "e-1", "e-2", "e-3"]),
    buyer=st.sampled_from(["a", "b"]),
    points=st.integers(-3, 3),
    balance=st.one_of(st.none(), st.none(), st.integers(-1, 3)),
    after_ms=st.integers(0, 3),
)
files = st.lists(rows, min_size=1, max_size=12)


@dataclass
class ImportTarget:
    """A shop for imports, whose points are deleted between two imports."""

    service: Service
    shop: Shop
    token: str
    folder: Path

    async def wipe(self) -> None:
        """Delete all points of the shop, bypassing the triggers that protect entries."""
        connection = await asyncpg.connect(self.service.database_url)
        await connection.execute("SET session_replication_role = replica")
        for table in TABLES:
            await connection.execute(f"DELETE FROM {table} WHERE merchant_id = $1", self.shop.merchant_id)  # noqa: S608 - a constant
        await connection.close()

    async def read(self) -> list[dict[str, object]]:
        """Return all rows of the shop's points."""
        connection = await asyncpg.connect(self.service.database_url)
        found = []
        for table in TABLES:
            query = f"SELECT * FROM {table} AS t WHERE merchant_id = $1 ORDER BY t::text"  # noqa: S608 - a constant
            found += [dict(record) for record in await connection.fetch(query, self.shop.merchant_id)]
        await connection.close()
        comparable = [{name: value for name, value in each.items() if name not in VARYING} for each in found]
        return sorted(comparable, key=str)

    async def run(self, lines: Sequence[Row], batch_size: int = 2) -> tuple[int, Counter[tuple[Row, str]]]:
        """Import lines; return the exit code, and the refused lines with their reasons."""
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *lines])
        file, report = self.folder / "events.csv", self.folder / "report.jsonl"
        file.write_text(text.getvalue())
        plan = ImportOptions(
            file=file,
            file_options=PointsFileOptions(Format.CSV, self.shop.merchant_id, self.shop.store_id),
            report=report,
            server=ShimSettings(grpc_address=f"127.0.0.1:{self.service.server.port}", token=SecretStr(self.token)),
            batch_size=batch_size,
            in_flight=3,
        )
        code = await run_import(plan, asyncio.Event())
        refused = [json.loads(line) for line in report.read_text().splitlines()]
        assert [each["line"] for each in refused] == sorted(each["line"] for each in refused)
        return code, Counter((lines[each["line"] - 2], each["reason"]) for each in refused)


def account_and_time(line: Row) -> tuple[str, str]:
    """Return the account and the time of a line."""
    return line[1], line[6]


@pytest.fixture
async def target(service: Service, client: Client, admin_token: str, tmp_path: Path) -> ImportTarget:
    """A new shop."""
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    return ImportTarget(service, shop, admin_token, tmp_path)


@given(files, st.randoms(use_true_random=False), st.integers(1, 4))
@example([row(points=-3, after_ms=2), row(points=3, after_ms=1)], None, 1)
@example([row("e-1", "b"), row("e-1", "a"), row("e-1", "a", after_ms=1)], None, 1)
@example(
    [row(balance=3, points=3), row(balance=3, points=3, update_type="increase"), row("e-1", points=3, balance=3)],
    None,
    1,
)
@example([row(points=-1, update_type="decrease"), row(points=-1), row(points=1, after_ms=-1)], None, 1)
@SETTINGS
async def test_any_permutation_of_a_file_gives_the_same_result(
    target: ImportTarget, lines: list[Row], random: object, batch_size: int
) -> None:
    """Refused lines, entries and accounts; importing again changes nothing."""
    permuted = lines[::-1]
    if random is not None:
        random.shuffle(permuted)  # type: ignore[attr-defined] # it is a Random
    await target.wipe()
    first = await target.run(lines, batch_size)
    stored = await target.read()
    again = await target.run(permuted)
    after_again = await target.read()
    await target.wipe()
    second = await target.run(permuted)

    assert second == first
    assert await target.read() == stored
    assert again == first
    assert after_again == stored
    await check_ledger(target.service.database_url, target.shop.merchant_id)


@given(files, st.integers(0, 12))
@example([*[row(points=0, after_ms=2)] * 6, row(points=1, after_ms=2), row(points=0, balance=-1)], 1)
@SETTINGS
async def test_a_partly_imported_file_gives_the_same_result(target: ImportTarget, lines: list[Row], count: int) -> None:
    """An interrupted import leaves the first accounts and times of a file."""
    await target.wipe()
    whole = await target.run(lines)
    stored = await target.read()
    await target.wipe()
    accounts_and_times = sorted({account_and_time(each) for each in lines})
    first_part = [each for each in lines if account_and_time(each) in accounts_and_times[:count]]
    if first_part:
        await target.run(first_part)

    assert await target.run(lines) == whole
    assert await target.read() == stored
