"""What a database holds of a merchant's points, read back and compared with the pure fold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy import text

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.ledger import queries
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, fold
from pointbook_server.ledger.queries import StoredEntry
from pointbook_server.ledger.transactions import LedgerTransactions
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions

ALL_LOTS = 10**9


def ledger_store(database: Database) -> LedgerTransactions:
    """Make a store as the server has it."""
    redemptions = RedemptionTransactions(
        database,
        ProgramTransactions(database),
        AccountRepository,
        CustomerRepository,
        ValidationCodeTransactions(database),
    )
    return LedgerTransactions(database, redemptions)


_ACCOUNTS, _CHECKPOINTS, _ENTRIES = (
    Statement(text(f"SELECT {', '.join(columns)} FROM {table} WHERE merchant_id = :merchant_id ORDER BY {order}"))  # noqa: S608 - names
    for table, columns, order in (
        ("points_accounts", queries.ACCOUNT_COLUMNS, "buyer_id"),
        ("points_checkpoints", queries.CHECKPOINT_COLUMNS, "newest_at_ms"),
        ("points_entries", queries.ENTRY_COLUMNS, "updated_at_ms, ordinal, event_id"),
    )
)


@dataclass
class Kept:
    """One account as the database keeps it: its row, and with all lots, its checkpoints with all lots, its entries."""

    row: Account = field(default_factory=Account)
    account: Account = field(default_factory=Account)
    checkpoints: dict[int, Account] = field(default_factory=dict)
    entries: list[StoredEntry] = field(default_factory=list)


async def read_book(database: Database, merchant_id: str) -> dict[AccountKey, Kept]:
    """Read a merchant's accounts, their checkpoints and entries, refused events left out."""

    async def read(connection: Connection) -> dict[AccountKey, Kept]:
        store, named = AccountRepository(connection, merchant_id), {"merchant_id": merchant_id}
        book: dict[AccountKey, Kept] = {}
        for key, account in map(queries.read_account, await connection.fetch(_ACCOUNTS, named)):
            book[key] = Kept(account, await store.complete(key, account, 0, lots=ALL_LOTS))
        for key, account in map(queries.read_account, await connection.fetch(_CHECKPOINTS, named)):
            complete = await store.complete(key, account, 0, lots=ALL_LOTS)
            book[key].checkpoints[account.newest_at_ms or 0] = complete
        for received in map(queries.read_entry, await connection.fetch(_ENTRIES, named)):
            if received.outcome is not ApplyOutcome.REFUSED:
                book[received.entry.event.account].entries.append(received)
        return book

    return await database.snapshot(read)


def check_is_the_fold(book: Mapping[AccountKey, Kept]) -> None:
    """Every account is the fold of its entries, so are their derived values, and so is every kept state."""
    for kept in book.values():
        events = [received.entry.event for received in kept.entries]
        void = {received.entry.event.event_id for received in kept.entries if received.void is not None}
        account, entries = fold(Account(), events, void)
        assert kept.account == account
        assert [received.entry for received in kept.entries] == entries
        for at_ms, checkpoint in kept.checkpoints.items():
            assert checkpoint == fold(Account(), [event for event in events if event.updated_at_ms <= at_ms], void)[0]


async def check_book(database_url: str, merchant_id: str) -> dict[AccountKey, Kept]:
    """Read a merchant's book, and check it."""
    database = Database(database_url, pool_size=1)
    try:
        book = await read_book(database, merchant_id)
    finally:
        await database.dispose()
    check_is_the_fold(book)
    return book


def without_ids(account: Account) -> Account:
    """An account but for the ids of its lots: of two ids for one content, the first to arrive names the event."""
    return replace(account, lots=tuple(lot._replace(event_id="") for lot in account.lots))
