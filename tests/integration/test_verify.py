"""Verification of the ledger on a real database."""

import asyncio
import random
from dataclasses import dataclass, field

import asyncpg
import pytest

from pointbook.v1 import points_pb2
from pointbook_server.db.database import Database
from pointbook_server.ledger.verification import Mismatch
from pointbook_server.ledger.verifier import LedgerVerifier, MerchantAccountKey, VerificationScope, VerificationSize
from support.clients import Client
from support.clocks import NOW_MS, at
from support.points import DECREASE, INCREASE, apply_batch, unvoid_entries, void_entries
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

START_MS = NOW_MS - 10_000_000
STEP_MS = 1_000
LOTS = 300
ACCOUNT = "UPDATE points_accounts SET {} WHERE merchant_id = $1"
ENTRY = "UPDATE points_entries SET {} WHERE merchant_id = $1 AND event_id LIKE '%-{}'"
CHECKPOINT = """
    UPDATE points_checkpoints SET {} WHERE merchant_id = $1
    AND newest_at_ms = (SELECT min(newest_at_ms) FROM points_checkpoints WHERE merchant_id = $1)
"""


@dataclass
class Report:
    """The progress and the mismatches of a verification."""

    total: VerificationSize | None = None
    accounts: int = 0
    entries: int = 0
    mismatches: list[tuple[MerchantAccountKey, Mismatch]] = field(default_factory=list)

    def on_start(self, total: VerificationSize) -> None:
        """Record the total."""
        self.total = total

    def on_progress(self, done: VerificationSize) -> None:
        """Add the progress."""
        self.accounts += done.accounts
        self.entries += done.entries

    def on_mismatch(self, account: MerchantAccountKey, mismatch: Mismatch) -> None:
        """Record a mismatch."""
        self.mismatches.append((account, mismatch))

    @property
    def columns(self) -> set[str]:
        """The mismatched columns, without event_ids and times of checkpoints."""
        columns = set()
        for _, mismatch in self.mismatches:
            row, colon, column = mismatch.name.rpartition(": ")
            columns.add(f"{row.split()[0]} {column}" if colon else mismatch.name)
        return columns


async def verify(database: Database, shop: Shop) -> Report:
    """Verify the accounts of a merchant."""
    report = Report()
    await LedgerVerifier(database).run(VerificationScope(merchant_id=shop.merchant_id), report)
    return report


async def tamper(service: Service, shop: Shop, statement: str) -> None:
    """Change a merchant's rows directly in the database; at least one must change."""
    connection = await asyncpg.connect(service.database_url)
    status: str = await connection.execute(statement, shop.merchant_id)
    await connection.close()
    assert status.rpartition(" ")[2] != "0"


@pytest.fixture
async def many_lots(client: Client, shop: Shop) -> Shop:
    """A shop with an account with overflow lots, checkpoints, a draw and a void."""
    run = unique("many-lots")
    updates = [
        shop.update(
            event_id=f"{run}-{n}",
            updated_value=10,
            points_balance=10 * (n + 1),
            points_expiry_time=at(NOW_MS + n * STEP_MS),
            updated_at=at(START_MS + n * STEP_MS),
        )
        for n in range(LOTS)
    ]
    updates.append(
        shop.update(
            event_id=f"{run}-draw",
            update_type=DECREASE,
            updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK,
            updated_value=15,
            points_balance=10 * LOTS - 15,
            updated_at=at(START_MS + LOTS * STEP_MS),
        )
    )
    updates.append(
        shop.update(
            event_id=f"{run}-void",
            updated_value=5,
            points_balance=10 * LOTS - 10,
            updated_at=at(START_MS + (LOTS + 1) * STEP_MS),
        )
    )
    await apply_batch(client, *updates)
    await void_entries(client, shop, f"{run}-void")
    return shop


async def test_a_correct_ledger_has_no_mismatches(database: Database, many_lots: Shop) -> None:
    """With overflow lots, checkpoints, draws and void entries."""
    report = await verify(database, many_lots)

    assert report.mismatches == []
    assert (report.accounts, report.entries) == (1, LOTS + 2)
    assert report.total == VerificationSize(1, LOTS + 2)


@pytest.mark.parametrize(
    ("statement", "column"),
    [
        (ACCOUNT.format("opening = opening + 1"), "opening"),
        (ACCOUNT.format("opening = NULL"), "opening"),
        (ACCOUNT.format("balance = balance + 1"), "balance"),
        (ACCOUNT.format("drift = drift + 1"), "drift"),
        (ACCOUNT.format("silently_expired = silently_expired + 1"), "silently_expired"),
        (ACCOUNT.format("lifetime_points = lifetime_points + 1"), "lifetime_points"),
        (ACCOUNT.format("newest_at_ms = newest_at_ms + 1"), "newest_at_ms"),
        (ACCOUNT.format("drawn_to_ms = drawn_to_ms + 1"), "drawn_to_ms"),
        (ACCOUNT.format("lots = jsonb_set(lots, '{0,0}', '4')"), "lots[0]"),
        (ACCOUNT.format("lots = lots - 1"), "lots[1]"),
        (ACCOUNT.format("lots = '[]'"), "far_lots"),
        (ACCOUNT.format("far_lots = jsonb_set(far_lots, '{0}', '1')"), "far_lots"),
        (ACCOUNT.format("far_lots = jsonb_set(far_lots, '{2}', '\"other\"')"), "far_lots"),
        (ACCOUNT.format("far_lots = NULL"), "far_lots"),
        (ENTRY.format("ordinal = 1", 7), "entry ordinal"),
        (ENTRY.format("balance_before = 1", 7), "entry balance_before"),
        (ENTRY.format("balance_after = 1", 7), "entry balance_after"),
        (ENTRY.format("drift = 1", 7), "entry drift"),
        (ENTRY.format("silently_expired = 1", 7), "entry silently_expired"),
        (ENTRY.format("draws = '[]'", "draw"), "entry draws"),
        (ENTRY.format("draws = jsonb_set(draws, '{0,0}', '9')", "draw"), "entry draws"),
        (ENTRY.format("balance_after = 1", "void"), "entry balance_after"),
        (ENTRY.format("ordinal = 1", "void"), "entry ordinal"),
        (CHECKPOINT.format("opening = 1"), "checkpoint opening"),
        (CHECKPOINT.format("balance = 1"), "checkpoint balance"),
        (CHECKPOINT.format("drift = 1"), "checkpoint drift"),
        (CHECKPOINT.format("silently_expired = 1"), "checkpoint silently_expired"),
        (CHECKPOINT.format("lifetime_points = 1"), "checkpoint lifetime_points"),
        (CHECKPOINT.format("drawn_to_ms = 1"), "checkpoint drawn_to_ms"),
        (CHECKPOINT.format("lots = jsonb_set(lots, '{5,1}', '4')"), "checkpoint lots[5]"),
        (CHECKPOINT.format("""far_lots = '[10, null, "e"]'"""), "checkpoint far_lots"),
    ],
)
async def test_each_changed_column_is_the_only_mismatch(
    statement: str, column: str, database: Database, service: Service, many_lots: Shop
) -> None:
    await tamper(service, many_lots, statement)

    report = await verify(database, many_lots)

    assert report.columns == {column}
    assert {account.merchant_id for account, _ in report.mismatches} == {many_lots.merchant_id}


async def test_a_checkpoint_without_an_entry_at_its_time_is_a_mismatch(
    database: Database, service: Service, many_lots: Shop
) -> None:
    await tamper(service, many_lots, CHECKPOINT.format("newest_at_ms = newest_at_ms + 1"))
    between = await verify(database, many_lots)
    await tamper(service, many_lots, CHECKPOINT.format(f"newest_at_ms = {NOW_MS}"))
    after = await verify(database, many_lots)

    for report in (between, after):
        assert [mismatch.folded for _, mismatch in report.mismatches] == ["no entry at its time"]


async def test_an_additional_lot_is_a_mismatch(database: Database, service: Service, many_lots: Shop) -> None:
    lots = """lots || '[[1, 1, null, "forged"]]'"""
    await tamper(service, many_lots, ACCOUNT.format(f"lots = {lots}"))

    report = await verify(database, many_lots)

    assert len(report.mismatches) == 1
    assert report.mismatches[0][1].name.startswith("lots[")


async def test_an_entry_voided_or_unvoided_in_the_database_is_a_mismatch(
    database: Database, service: Service, many_lots: Shop
) -> None:
    await tamper(service, many_lots, ENTRY.format("voided_at_ms = NULL, void_reason = NULL", "void"))
    counting = await verify(database, many_lots)
    await tamper(service, many_lots, ENTRY.format("voided_at_ms = 1, void_reason = ''", 200))
    voided = await verify(database, many_lots)

    assert {"balance", "lifetime_points"} <= counting.columns
    assert "entry drift" in voided.columns


async def test_an_account_without_entries_is_a_mismatch(database: Database, service: Service, shop: Shop) -> None:
    await tamper(
        service,
        shop,
        "INSERT INTO points_accounts (merchant_id, store_id, buyer_id, balance)"
        f" SELECT $1, '{shop.store_id}', 'forged', 5",
    )

    report = await verify(database, shop)

    ((account, mismatch),) = report.mismatches
    assert (account.key.buyer_id, mismatch.name, mismatch.folded) == ("forged", "account", "no entries")


async def test_entries_without_an_account_are_a_mismatch(database: Database, service: Service, many_lots: Shop) -> None:
    await tamper(service, many_lots, "DELETE FROM points_accounts WHERE merchant_id = $1")

    report = await verify(database, many_lots)

    ((_, mismatch),) = report.mismatches
    assert (mismatch.name, mismatch.stored) == ("account", "nothing")
    assert str(10 * LOTS - 15) in mismatch.folded


async def test_a_stored_refusal_is_not_an_entry(client: Client, database: Database, shop: Shop) -> None:
    await apply_batch(client, shop.update(update_type=DECREASE, points_balance=None))

    assert await verify(database, shop) == Report(VerificationSize(0, 0))


def random_updates(shop: Shop, count: int, rng: random.Random) -> list[points_pb2.PointsUpdate]:
    """Build random events of a few accounts.

    Many share a millisecond, some have no balance.
    """
    updates = []
    for _ in range(count):
        at_ms = START_MS + rng.randrange(count)
        expires = rng.random() < 0.5
        updates.append(
            shop.update(
                f"buyer-{rng.randrange(3)}",
                update_type=rng.choice([INCREASE, INCREASE, DECREASE]),
                updated_value=rng.randrange(50),
                points_balance=None if rng.random() < 0.3 else rng.randrange(-20, 500),
                points_expiry_time=at(at_ms + rng.randrange(count)) if expires else None,
                updated_at=at(at_ms),
            )
        )
    return updates


async def stir(client: Client, shop: Shop, random_state: int) -> None:
    """Send events late and repeatedly, and void and unvoid some of them."""
    rng = random.Random(random_state)  # noqa: S311 - not for security
    updates = random_updates(shop, 600, rng)
    for start in range(0, len(updates), 40):
        await apply_batch(client, *updates[start : start + 40])
        known = [update.event_id for update in updates[:start] if update.HasField("points_balance")]
        if known:
            ids = rng.sample(known, min(5, len(known)))
            await void_entries(client, shop, *ids)
            await unvoid_entries(client, shop, *ids[:2])


@pytest.mark.parametrize("random_state", range(4))
async def test_a_ledger_after_late_repeated_and_void_events_has_no_mismatches(
    random_state: int, client: Client, database: Database, shop: Shop
) -> None:
    await stir(client, shop, random_state)

    report = await verify(database, shop)

    assert report.mismatches == []
    assert report.accounts == 3
    assert report.entries > 300


async def test_a_ledger_is_verified_while_it_is_written(client: Client, database: Database, shop: Shop) -> None:
    stirring = asyncio.create_task(stir(client, shop, random_state=9))
    runs = 0
    while not stirring.done():
        assert (await verify(database, shop)).mismatches == []
        runs += 1
    await stirring

    assert runs >= 3


async def test_only_the_given_accounts_are_verified(client: Client, database: Database, shop: Shop) -> None:
    await apply_batch(client, *(shop.update(f"buyer-{n}", points_balance=20) for n in range(3)))
    scopes = [
        VerificationScope(shop.merchant_id),
        VerificationScope(shop.merchant_id, shop.store_id, "buyer-1"),
        VerificationScope(store_id=shop.store_id),
        VerificationScope("unknown"),
    ]

    accounts = []
    for scope in scopes:
        report = Report()
        await LedgerVerifier(database).run(scope, report)
        accounts.append(report.accounts)

    assert accounts == [3, 1, 3, 0]
