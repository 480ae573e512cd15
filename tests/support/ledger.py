"""A merchant's points as the database stores them, compared with the pure fold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy import text

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.ledger import queries, rows
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, StoredEntry
from pointbook_server.ledger.transactions import LedgerTransactions
from pointbook_server.metrics import Metrics
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions

ALL_LOTS = 10**9


def ledger_transactions(database: Database) -> LedgerTransactions:
    """Build the ledger's transactions as the server does."""
    redemptions = RedemptionTransactions(
        database,
        ProgramTransactions(database),
        AccountRepository,
        CustomerRepository,
        ValidationCodeTransactions(database),
    )
    return LedgerTransactions(database, redemptions, Metrics(), count_event=lambda _scene, _outcome: None)


_ACCOUNTS, _CHECKPOINTS, _ENTRIES = (
    Statement(text(f"SELECT {', '.join(columns)} FROM {table} WHERE merchant_id = :merchant_id ORDER BY {order}"))  # noqa: S608 - constant names
    for table, columns, order in (
        ("points_accounts", queries.ACCOUNT_COLUMNS, "buyer_id"),
        ("points_checkpoints", queries.CHECKPOINT_COLUMNS, "newest_at_ms"),
        ("points_entries", queries.ENTRY_COLUMNS, "updated_at_ms, ordinal, event_id"),
    )
)


@dataclass
class StoredAccount:
    """A stored account: its row, its entries, and all lots of it and its checkpoints."""

    row: Account = field(default_factory=Account)
    account: Account = field(default_factory=Account)
    checkpoints: dict[int, Account] = field(default_factory=dict)
    entries: list[StoredEntry] = field(default_factory=list)


async def read_ledger(database: Database, merchant_id: str) -> dict[AccountKey, StoredAccount]:
    """Read a merchant's accounts with their checkpoints and entries, without refusals."""

    async def read(connection: Connection) -> dict[AccountKey, StoredAccount]:
        repository, params = AccountRepository(connection, merchant_id), {"merchant_id": merchant_id}
        ledger: dict[AccountKey, StoredAccount] = {}
        for key, account in map(rows.account_from_row, await connection.fetch(_ACCOUNTS, params)):
            ledger[key] = StoredAccount(account, await repository.load_lots(key, account, 0, lots=ALL_LOTS))
        for key, account in map(rows.account_from_row, await connection.fetch(_CHECKPOINTS, params)):
            complete = await repository.load_lots(key, account, 0, lots=ALL_LOTS)
            ledger[key].checkpoints[account.newest_at_ms or 0] = complete
        for stored in map(rows.entry_from_row, await connection.fetch(_ENTRIES, params)):
            if stored.outcome is not ApplyOutcome.REFUSED:
                ledger[stored.entry.event.account_key].entries.append(stored)
        return ledger

    return await database.snapshot(read)


def assert_is_fold(ledger: Mapping[AccountKey, StoredAccount]) -> None:
    """Check that accounts, derived values and checkpoints are the fold of entries."""
    for stored_account in ledger.values():
        events = [stored.entry.event for stored in stored_account.entries]
        void_ids = {stored.entry.event.event_id for stored in stored_account.entries if stored.void is not None}
        account, entries = fold(Account(), events, void_ids)
        assert stored_account.account == account
        assert [stored.entry for stored in stored_account.entries] == entries
        for at_ms, checkpoint in stored_account.checkpoints.items():
            earlier = [event for event in events if event.updated_at_ms <= at_ms]
            assert checkpoint == fold(Account(), earlier, void_ids)[0]


async def check_ledger(database_url: str, merchant_id: str) -> dict[AccountKey, StoredAccount]:
    """Read a merchant's accounts, and check that they are the fold of their entries."""
    database = Database(database_url, pool_size=1)
    try:
        ledger = await read_ledger(database, merchant_id)
    finally:
        await database.dispose()
    assert_is_fold(ledger)
    return ledger


def without_lot_ids(account: Account) -> Account:
    """Return an account without the event_ids of its lots.

    If two events have the same content, the lots have the event_id of the one that arrived first.
    """
    return replace(account, lots=tuple(lot._replace(event_id="") for lot in account.lots))
