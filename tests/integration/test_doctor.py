"""`pointbook doctor` on databases that are away, hang, or have problems."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import SecretStr

from pointbook.v1 import programs_pb2, webhooks_pb2
from pointbook_cli.doctor import database as doctor
from pointbook_cli.doctor import records
from pointbook_cli.doctor.findings import Finding, Level
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.clock import system_clock
from pointbook_server.db import clock_skew
from pointbook_server.db.clock_skew import SYSTEM_CLOCK
from pointbook_server.db.database import Connection
from pointbook_server.settings import ServerSettings
from support.clients import Client
from support.clocks import at
from support.connections import connected
from support.database_proxy import proxied
from support.embedded_database import Cluster
from support.redemption import redeem, redeem_request
from support.servers import running_server
from support.shops import Shop
from support.tokens import make_token, revoke_token

SILENT_HOURS = 48
NAMES = ["database", "schema", "clock", "tokens", "quarantine", "stores", "drift", "holds", "erasures"]
SHOP = Shop("merchant", "store")


@pytest.fixture
async def own_url(cluster: Cluster, database_url: str) -> str:
    """A migrated database for one test; the file's database makes its template."""
    del database_url
    return await cluster.clone("pointbook_template")


async def diagnose(url: str, **changes: Any) -> dict[str, list[Finding]]:
    """Check a database, and return the findings by the name of their check."""
    settings = ServerSettings(database_url=SecretStr(url), **changes)
    found: dict[str, list[Finding]] = {}
    for finding in await doctor.check_database(settings, SILENT_HOURS):
        found.setdefault(finding.check, []).append(finding)
    assert list(found) == NAMES
    return found


def levels(found: dict[str, list[Finding]]) -> dict[str, Level]:
    """Return the level of each check that has one finding and is not good."""
    return {name: each[0].level for name, each in found.items() if each[0].level is not Level.OK}


async def run_sql(url: str, *statements: str) -> None:
    """Run SQL with all privileges."""
    async with connected(url) as connection:
        for statement in statements:
            await connection.execute(statement)


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[Client]:
    """Run a server with the real clock and a store, and revoke its token at the end."""
    token = await make_token(url, [ALL_MERCHANTS], list(Scope))
    async with running_server(url, token, clock=SYSTEM_CLOCK) as (_, client):
        await client.put_store(SHOP.merchant_id, SHOP.store_id)
        yield client
    await revoke_token(url, token)


async def test_a_new_database_has_no_problems(own_url: str) -> None:
    found = await diagnose(own_url)

    assert levels(found) == {"tokens": Level.WARNING}
    assert found["database"][0].text.startswith("PostgreSQL ")
    assert found["schema"][0].text.startswith("revision 00")


async def test_a_database_that_is_away_is_one_problem(own_url: str) -> None:
    async with proxied(own_url) as proxy:
        url = proxy.url
    found = await diagnose(url)

    assert levels(found) == {"database": Level.PROBLEM} | dict.fromkeys(NAMES[1:], Level.UNCHECKED)
    assert "ConnectionRefusedError" in found["database"][0].text


async def test_a_refused_login_names_its_cause_without_the_password(own_url: str) -> None:
    name = own_url.partition("?")[0].rpartition("/")[2]
    found = await diagnose(own_url.replace(f"/{name}", "/nowhere").replace("@", ":hunter22@"))

    assert found["database"][0].level is Level.PROBLEM
    assert 'database "nowhere" does not exist' in found["database"][0].text
    assert "hunter22" not in repr(found)


async def test_a_hanging_database_does_not_hang_the_doctor(own_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.5)
    async with proxied(own_url) as proxy:
        proxy.freeze()
        started = time.monotonic()
        found = await diagnose(proxy.url)
        seconds = time.monotonic() - started

    assert levels(found) == {"database": Level.PROBLEM} | dict.fromkeys(NAMES[1:], Level.UNCHECKED)
    assert "no response within 0.5 s" in found["database"][0].text
    assert seconds < 10


async def test_a_database_that_starts_to_hang_ends_the_checks(own_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.5)
    async with proxied(own_url) as proxy:

        async def hang(connection: Connection) -> list[Finding]:
            proxy.freeze()
            return await records.check_drift(connection)

        monkeypatch.setattr(records, "check_tokens", hang)
        found: dict[str, list[Level]] = {}
        settings = ServerSettings(database_url=SecretStr(proxy.url))
        for finding in await doctor.check_database(settings, SILENT_HOURS):
            found.setdefault(finding.check, []).append(finding.level)

    assert found == {
        "database": [Level.OK, Level.PROBLEM],
        "schema": [Level.OK],
        "clock": [Level.OK],
        **{name: [Level.UNCHECKED] for name in NAMES[3:]},
    }


async def test_one_slow_check_does_not_stop_the_others(own_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.5)
    async with connected(own_url) as connection, connection.transaction():
        await connection.execute("LOCK TABLE redemptions")
        found = await diagnose(own_url)

    assert levels(found) == {"tokens": Level.WARNING, "holds": Level.WARNING}
    assert found["holds"][0].text == "not checked: no response within 0.5 s"


async def test_an_older_schema_is_a_problem_and_the_rest_is_checked(own_url: str) -> None:
    await run_sql(own_url, "UPDATE alembic_version SET version_num = '0001'", "DROP TABLE redemptions CASCADE")
    found = await diagnose(own_url)

    assert levels(found) == {"schema": Level.PROBLEM, "tokens": Level.WARNING, "holds": Level.UNCHECKED}
    assert "lacks the tables redemptions: run `pointbook migrate`" in found["schema"][0].text
    assert "42P01" in found["holds"][0].text


async def test_missing_privileges_are_a_problem(own_url: str) -> None:
    role = "doctor_without_privileges"
    await run_sql(own_url, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    user = own_url.partition("://")[2].partition("@")[0]
    found = await diagnose(own_url.replace(f"{user}@", f"{role}@"))

    assert levels(found) == {"schema": Level.PROBLEM, "tokens": Level.WARNING}
    assert "lacks privileges: grant it UPDATE on api_tokens; INSERT, UPDATE, DELETE on " in found["schema"][0].text


async def test_a_read_only_database_is_a_problem(own_url: str) -> None:
    name = own_url.partition("?")[0].rpartition("/")[2]
    await run_sql(own_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    found = await diagnose(own_url)

    assert levels(found) == {"database": Level.PROBLEM, "schema": Level.PROBLEM, "tokens": Level.WARNING}
    assert "read-only" in found["database"][0].text


async def test_too_many_connections_and_no_autovacuum_are_found(own_url: str) -> None:
    await run_sql(own_url, "ALTER TABLE points_accounts SET (autovacuum_enabled = false)")
    found = await diagnose(own_url, workers=10, database_pool_size=500)

    connections, autovacuum = found["database"]
    assert (connections.level, autovacuum.level) == (Level.WARNING, Level.PROBLEM)
    assert connections.text.startswith("the server's 10 x (500 + 2) connections do not fit into the ")
    assert autovacuum.text == "autovacuum is off for points_accounts"


async def test_a_limit_of_connections_of_the_role_counts(own_url: str) -> None:
    name = own_url.partition("?")[0].rpartition("/")[2]
    await run_sql(own_url, f'ALTER DATABASE "{name}" CONNECTION LIMIT 11')

    assert "of 11" in (await diagnose(own_url))["database"][0].text
    assert (await diagnose(own_url, database_pool_size=9))["database"][0].level is Level.OK


@pytest.mark.parametrize(
    ("ahead_ms", "level", "text"),
    [
        (3_000, Level.WARNING, "3.0 s ahead of the database's: a server here releases and deletes nothing"),
        (-40_000, Level.PROBLEM, "40.0 s behind the database's: a server here refuses all calls"),
    ],
)
async def test_a_clock_that_differs_is_found(
    own_url: str, monkeypatch: pytest.MonkeyPatch, ahead_ms: int, level: Level, text: str
) -> None:
    monkeypatch.setattr(clock_skew, "system_clock", lambda: system_clock() + ahead_ms)
    (finding,) = (await diagnose(own_url))["clock"]

    assert finding.level is level
    assert finding.text.endswith(text)


async def test_silent_stores_and_drift_are_found(own_url: str) -> None:
    now_ms = system_clock()
    busy = Shop(SHOP.merchant_id, "busy")
    async with serving(own_url) as client:
        for store_id in ("busy", "new", "old"):
            await client.put_store(SHOP.merchant_id, store_id)
        await client.apply(SHOP.update(updated_at=at(now_ms - 3_000)))
        await client.apply(busy.update(updated_at=at(now_ms - 3_000)))
        await client.apply(busy.update(updated_at=at(now_ms - 2_000), points_balance=33))
    registered = await diagnose(own_url)
    await run_sql(
        own_url,
        "UPDATE stores SET last_webhook_at_ms = updated_at_ms WHERE store_id = 'busy'",
        "UPDATE stores SET last_webhook_at_ms = updated_at_ms - 49 * 3600000 WHERE store_id = 'store'",
        "UPDATE stores SET updated_at_ms = updated_at_ms - 49 * 3600000 WHERE store_id IN ('old', 'busy')",
    )
    found = await diagnose(own_url)

    assert registered["stores"][0].text == "4 registered, none is silent"
    assert levels(found) == dict.fromkeys(("tokens", "stores", "drift"), Level.WARNING)
    assert found["stores"][0].text == "no webhook for 48 h from 2 stores: merchant/old, merchant/store"
    assert found["drift"][0].text == "1 account drifts, by -7 points in total, of 1 merchant"


async def test_quarantine_holds_and_erasures_are_found(own_url: str) -> None:
    now_ms = system_clock()
    async with serving(own_url) as client:
        await client.put_program(SHOP.merchant_id, SHOP.store_id, criteria={})
        await client.apply(SHOP.update(updated_at=at(now_ms - 2_000), updated_value=500, points_balance=500))
        await redeem(client, redeem_request(SHOP, 30))
        await client.programs.RequestStoreErasure(
            programs_pb2.RequestStoreErasureRequest(
                event_id="e-1",
                merchant_id=SHOP.merchant_id,
                store_id=SHOP.store_id,
                request_time=at(now_ms - 31 * DAY_MS),
            )
        )
        for number in range(3):
            await client.webhooks.QuarantineWebhook(
                webhooks_pb2.QuarantineWebhookRequest(
                    merchant_id=SHOP.merchant_id,
                    topic="points/update",
                    body=f"no JSON {number}".encode(),
                    reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
                    detail="body must be JSON in UTF-8",
                )
            )
    await run_sql(own_url, "UPDATE redemptions SET settle_by_ms = settle_by_ms - 73 * 3600000")
    found = await diagnose(own_url, quarantine_total_webhooks_max=3)

    bad = {"tokens": Level.WARNING, "quarantine": Level.WARNING, "holds": Level.PROBLEM, "erasures": Level.PROBLEM}
    assert levels(found) == bad
    assert [(finding.level, finding.text) for finding in found["quarantine"]] == [
        (Level.WARNING, "3 MALFORMED; the oldest waits for less than a minute"),
        (Level.PROBLEM, "100% of the space for all merchants is used"),
    ]
    full = await diagnose(own_url, quarantine_shared_webhooks_max=3, quarantine_webhooks_max=3)
    assert [(finding.level, finding.text) for finding in full["quarantine"][1:]] == [
        (Level.PROBLEM, "100% of the space that merchants share is used"),
    ]
    await run_sql(
        own_url, "UPDATE quarantined_webhooks SET state = 'REPLAYED', replayed_at_ms = 1, replay_event_id = 'e'"
    )
    assert (await diagnose(own_url))["quarantine"][0].text == "none waits, 3 replayed"
    assert found["holds"][0].text == "1 redemption holds 30 overdue points, the oldest for 1 hour"
    assert found["erasures"][0].text == "1 overdue request to erase a store"


async def test_without_a_database_url_nothing_is_checked() -> None:
    for settings in (None, ServerSettings(database_url=None)):
        found = await doctor.check_database(settings, SILENT_HOURS)

        assert [finding.check for finding in found] == NAMES
        assert {finding.level for finding in found} == {Level.UNCHECKED}
