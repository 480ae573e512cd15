"""The book is verified: whatever it keeps beside the events is what a fold from the very beginning says."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import asyncpg
import pytest

from pointbook.v1 import points_pb2
from pointbook_server.db.database import Database
from pointbook_server.ledger.audit import Audit, AuditScope, Place, Size
from pointbook_server.ledger.verification import Mismatch
from support.harness import NOW_MS, Client, Service, Shop, at, unique

INCREASE = points_pb2.POINTS_UPDATE_TYPE_INCREASE
DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
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
class Heard:
    """What an audit told."""

    total: Size | None = None
    accounts: int = 0
    entries: int = 0
    mismatches: list[tuple[Place, Mismatch]] = field(default_factory=list)

    def begin(self, size: Size) -> None:
        """Hear how much there is."""
        self.total = size

    def advance(self, size: Size) -> None:
        """Hear what more was done."""
        self.accounts += size.accounts
        self.entries += size.entries

    def tell(self, place: Place, mismatch: Mismatch) -> None:
        """Hear what is wrong."""
        self.mismatches.append((place, mismatch))

    @property
    def whats(self) -> set[str]:
        """What is wrong, without the ids of entries and the moments of checkpoints."""
        found = set()
        for _, mismatch in self.mismatches:
            kind, colon, what = mismatch.what.rpartition(": ")
            found.add(f"{kind.split()[0]} {what}" if colon else mismatch.what)
        return found


@pytest.fixture
async def database(service: Service) -> AsyncIterator[Database]:
    """A pool as the command has one."""
    pool = Database(service.database_url, pool_size=1)
    yield pool
    await pool.dispose()


async def audit(database: Database, shop: Shop) -> Heard:
    """Verify a merchant."""
    heard = Heard()
    await Audit(database).run(AuditScope(merchant_id=shop.merchant_id), heard)
    return heard


async def tamper(service: Service, shop: Shop, statement: str) -> None:
    """Change a merchant's rows behind the back of the service; something must have changed."""
    connection = await asyncpg.connect(service.database_url)
    status: str = await connection.execute(statement, shop.merchant_id)
    await connection.close()
    assert status.rpartition(" ")[2] != "0"


async def send(client: Client, updates: list[points_pb2.PointsUpdate]) -> None:
    """Send updates in one call."""
    await client.points.BatchApplyPointsUpdates(points_pb2.BatchApplyPointsUpdatesRequest(updates=updates))


@pytest.fixture
async def wide(client: Client, shop: Shop) -> Shop:
    """A shop whose one account has more lots than its row keeps, checkpoints, a draw and a void entry."""
    run = unique("wide")
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
    await send(client, updates)
    await client.points.VoidPointsEntries(
        points_pb2.VoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=[f"{run}-void"], reason="test")
    )
    return shop


async def test_a_true_book_is_all_right(database: Database, wide: Shop) -> None:
    """Lots that are kept as a sum, checkpoints, draws and void entries are as the fold says; all of it is counted."""
    heard = await audit(database, wide)

    assert heard.mismatches == []
    assert (heard.accounts, heard.entries) == (1, LOTS + 2)
    assert heard.total == Size(1, LOTS + 2)


@pytest.mark.parametrize(
    ("statement", "what"),
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
async def test_each_thing_that_was_changed_is_found(
    statement: str, what: str, database: Database, service: Service, wide: Shop
) -> None:
    """One column that is not what the fold says is one difference: that column, and nothing else."""
    await tamper(service, wide, statement)

    heard = await audit(database, wide)

    assert heard.whats == {what}
    assert {place.merchant_id for place, _ in heard.mismatches} == {wide.merchant_id}


async def test_a_checkpoint_of_no_entry_is_found(database: Database, service: Service, wide: Shop) -> None:
    """A checkpoint stands after an entry of its moment; one in between, or behind the end, was not made by a fold."""
    await tamper(service, wide, CHECKPOINT.format("newest_at_ms = newest_at_ms + 1"))
    between = await audit(database, wide)
    await tamper(service, wide, CHECKPOINT.format(f"newest_at_ms = {NOW_MS}"))
    behind = await audit(database, wide)

    for heard in (between, behind):
        assert [mismatch.folded for _, mismatch in heard.mismatches] == ["has no entry of its time"]


async def test_more_lots_than_there_are_is_found(database: Database, service: Service, wide: Shop) -> None:
    """A lot that no entry has made is a difference, behind the last one as well."""
    lots = """lots || '[[1, 1, null, "forged"]]'"""
    await tamper(service, wide, ACCOUNT.format(f"lots = {lots}"))

    heard = await audit(database, wide)

    assert len(heard.mismatches) == 1
    assert heard.mismatches[0][1].what.startswith("lots[")


async def test_an_entry_that_counts_or_not_changes_what_follows(
    database: Database, service: Service, wide: Shop
) -> None:
    """Voiding behind the back of the service shows in the account."""
    await tamper(service, wide, ENTRY.format("voided_at_ms = NULL, void_reason = NULL", "void"))
    counting = await audit(database, wide)
    await tamper(service, wide, ENTRY.format("voided_at_ms = 1, void_reason = ''", 200))
    voided = await audit(database, wide)

    assert {"balance", "lifetime_points"} <= counting.whats
    assert "entry drift" in voided.whats


async def test_an_account_without_entries_is_found(database: Database, service: Service, shop: Shop) -> None:
    """An account comes with its first entry, so that one alone is forged."""
    await tamper(
        service,
        shop,
        "INSERT INTO points_accounts (merchant_id, store_id, buyer_id, balance)"
        f" SELECT $1, '{shop.store_id}', 'forged', 5",
    )

    heard = await audit(database, shop)

    ((place, mismatch),) = heard.mismatches
    assert (place.key.buyer_id, mismatch.what, mismatch.folded) == ("forged", "account", "has no entries")


async def test_entries_without_an_account_are_found(database: Database, service: Service, wide: Shop) -> None:
    """Entries stay when their account is taken away, and say what it held."""
    await tamper(service, wide, "DELETE FROM points_accounts WHERE merchant_id = $1")

    heard = await audit(database, wide)

    ((_, mismatch),) = heard.mismatches
    assert (mismatch.what, mismatch.stored) == ("account", "nothing")
    assert str(10 * LOTS - 15) in mismatch.folded


async def test_a_refused_event_is_no_entry(client: Client, database: Database, shop: Shop) -> None:
    """What is remembered only to be refused again belongs to no account."""
    await send(client, [shop.update(update_type=DECREASE, points_balance=None)])

    assert await audit(database, shop) == Heard(Size(0, 0))


def random_updates(shop: Shop, count: int, rng: random.Random) -> list[points_pb2.PointsUpdate]:
    """Events of a few accounts that are true by chance alone: many share a millisecond, some have no balance."""
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


async def stir(client: Client, shop: Shop, seed: int) -> None:
    """Send events late and again, and void some of them and take it back."""
    rng = random.Random(seed)  # noqa: S311 - a test repeats it
    updates = random_updates(shop, 600, rng)
    for start in range(0, len(updates), 40):
        await send(client, updates[start : start + 40])
        known = [update.event_id for update in updates[:start] if update.HasField("points_balance")]
        if known:
            ids = rng.sample(known, min(5, len(known)))
            void = points_pb2.VoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=ids, reason="test")
            await client.points.VoidPointsEntries(void)
            unvoid = points_pb2.UnvoidPointsEntriesRequest(
                merchant_id=shop.merchant_id, event_ids=ids[:2], reason="test"
            )
            await client.points.UnvoidPointsEntries(unvoid)


@pytest.mark.parametrize("seed", range(4))
async def test_a_stirred_book_is_all_right(seed: int, client: Client, database: Database, shop: Shop) -> None:
    """After many late events, repetitions and voids every account and checkpoint is still what its entries say."""
    await stir(client, shop, seed)

    heard = await audit(database, shop)

    assert heard.mismatches == []
    assert heard.accounts == 3
    assert heard.entries > 300


async def test_a_book_is_verified_while_it_is_written(client: Client, database: Database, shop: Shop) -> None:
    """An audit sees one moment of the book: what is written meanwhile makes no difference."""
    stirring = asyncio.create_task(stir(client, shop, seed=9))
    audits = 0
    while not stirring.done():
        assert (await audit(database, shop)).mismatches == []
        audits += 1
    await stirring

    assert audits >= 3


async def test_only_what_is_wanted_is_verified(client: Client, database: Database, shop: Shop) -> None:
    """A merchant, a store and a buyer each narrow the audit."""
    await send(client, [shop.update(f"buyer-{n}", points_balance=20) for n in range(3)])
    wanted = [
        AuditScope(shop.merchant_id),
        AuditScope(shop.merchant_id, shop.store_id, "buyer-1"),
        AuditScope(store_id=shop.store_id),
        AuditScope("nobody"),
    ]

    accounts = []
    for some in wanted:
        heard = Heard()
        await Audit(database).run(some, heard)
        accounts.append(heard.accounts)

    assert accounts == [3, 1, 3, 0]
